"""Running a checkpoint on the oracle's inputs: token ids in the original's spelling, images by their path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.model.qwen_vl import QwenVL
from qvl_runtime.model.rotary import ntk_alpha
from qvl_runtime.schedule.image_cache import ImageCache
from qvl_runtime.schedule.kv_cache import KVCache
from qvl_runtime.schedule.runner import Chunk, Runner, Span
from qvl_runtime.weights.loader import load_weights
from tests.stand_ins import recorded_features, shown

LOGITS = 2e-4  # the oracle's own tolerances in float32 (golden/README.md); its independent second
VISION = 2e-5  # implementation differs by 4e-5 and 4e-6


class Spelled(NamedTuple):
    """Where the original spells an image's path, and the path: ids start to start + 256."""

    start: int
    path: str


def spelled_images(ids: Sequence[int], config: ModelConfig) -> list[Spelled]:
    """The image spans of ids in which the original spelled paths byte by byte."""
    visual, found = config.visual, []
    for start in (i + 1 for i, t in enumerate(ids) if t == visual.image_start_id):
        span = ids[start : start + visual.n_queries]
        found.append(Spelled(start, bytes(t for t in span if t < 256).decode()))
    return found


def without_padding(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The rows of a left-padded batch, each as long as it is."""
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


class Oracle:
    """A checkpoint, a cache for it, and the folder in which the original was run."""

    def __init__(
        self, root: Path, name: str, dtype: torch.dtype = torch.float32, folder: Path | None = None, **overrides: object
    ) -> None:
        """folder: where the checkpoint is, if not in `root` under its name."""
        from dataclasses import replace

        self.root, folder = root, folder or root / name
        self.config = replace(ModelConfig.from_folder(folder), **overrides)
        state, packed, _ = load_weights(folder, self.config, dtype, torch.device("cpu"))
        self.model = QwenVL(self.config, state, packed=packed)
        self.cache = KVCache(self.config, 4096, dtype, torch.device("cpu"))
        images = ImageCache(1 << 24)
        for digest, features in recorded_features(self.root, self.config.visual.image_size).items():
            images.put(digest, features.to(dtype))
        self.runner = Runner(self.model, self.cache, images)

    def chunk(self, ids: Sequence[int]) -> Chunk:
        """A new sequence with a whole prompt; close it when done."""
        spelled = spelled_images(ids, self.config)
        size = self.config.visual.image_size
        features = self.runner.features([shown(self.root, image.path, size) for image in spelled])
        spans = [Span(image.start, rows) for image, rows in zip(spelled, features, strict=True)]
        return Chunk(self.cache.sequence(ntk_alpha(self.config, len(ids))), ids, spans)

    def prefill(self, *prompts: Sequence[int]) -> list[Tensor]:
        """Logits [n, vocab] of each prompt, all in one model call."""
        chunks = [self.chunk(ids) for ids in prompts]
        logits = self.model.logits(self.runner.run(chunks))
        for chunk in chunks:
            chunk.sequence.close()
        return list(logits.split([len(ids) for ids in prompts]))  # type: ignore[no-untyped-call]

    def observed(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """Every intermediate result of one prompt, and its logits."""
        seen: dict[str, Tensor] = {}
        chunk = self.chunk(ids)
        with chunk.sequence:
            x = self.runner.run([chunk], seen.__setitem__)
        return seen | {"final_hidden": x, "logits": self.model.logits(x)}


def close(got: Tensor, want: Tensor, tolerance: float, name: str = "") -> None:
    """Equal shapes, and no element further off than the tolerance."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    error = (got.double() - want.double()).abs().max().item()
    assert error <= tolerance, f"{name}: off by {error:.2e}, allowed {tolerance:.0e}"
