"""Qwen-VL: the visual tower and the decoder, one call a step for rows of many requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qvl_kernels import ops_for
from qvl_runtime.config import ModelConfig
from qvl_runtime.model.language import Decoder, LayerCache, Layout, Observer, unobserved
from qvl_runtime.model.rotary import positions_of
from qvl_runtime.model.vision import VisualTower


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """The rows of one model call: n rows of R requests, one after another, without padding."""

    token_ids: Tensor  # int64 [n]
    positions: Tensor  # int64 [n], from 0 in each request
    alphas: Sequence[float]  # R, the NTK factor each request was admitted with
    layout: Layout
    picture_rows: Tensor | None = None  # int64 [m], rows inside image spans
    picture_features: Tensor | None = None  # [m, D], what stands there in place of an embedding


class QwenVL:
    """The model on one device. It holds weights and no state: the caches belong to the caller."""

    def __init__(self, config: ModelConfig, state: Mapping[str, Tensor]) -> None:
        """state: the published names, checked (weights.checkpoint.load_state), on one device and in one dtype."""
        embedding = state["transformer.wte.weight"]
        self.config, self.device, self.dtype = config, embedding.device, embedding.dtype
        self.bytes_by_part = _bytes_by_part(state)
        ops = ops_for(self.device)
        self.visual = VisualTower(config.visual, state, ops)
        self.decoder = Decoder(config, state, ops)

    @torch.inference_mode()
    def encode_pictures(self, pixels: Tensor, observe: Observer = unobserved) -> Tensor:
        """Normalised pixels float32 [P, 3, S, S] to features [P, queries, D]."""
        return self.visual.forward(pixels.to(self.device), observe)

    @torch.inference_mode()
    def forward(self, step: Step, caches: Sequence[LayerCache], observe: Observer = unobserved) -> Tensor:
        """Run the rows of a step: residual stream [n, D]; their keys and values enter the caches."""
        x = F.embedding(step.token_ids, self.decoder.embedding)
        if step.picture_rows is not None and step.picture_features is not None:
            x[step.picture_rows] = step.picture_features.to(x.dtype)
        observe("embed", x)
        at = positions_of(self.config, step.positions, step.alphas, step.layout.query_starts)
        return self.decoder.forward(x, at, step.layout, caches, observe)

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """Rows [m, D] of the residual stream to logits [m, vocab]: ask only for the rows that need them."""
        return self.decoder.logits(x)


def _bytes_by_part(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes of the weights: vision, language, embedding and head."""
    parts = {"vision": 0, "language": 0, "embedding": 0, "head": 0}
    names = {"transformer.wte.weight": "embedding", "lm_head.weight": "head"}
    for name, tensor in state.items():
        part = "vision" if name.startswith("transformer.visual.") else names.get(name, "language")
        parts[part] += tensor.nbytes
    return parts
