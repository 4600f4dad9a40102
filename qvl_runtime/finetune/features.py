"""Images in training: what the frozen part of the vision encoder gives for each, computed once and kept by digest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from qvl_runtime.finetune.network import Network
from qvl_runtime.prompt.images import ImageSource, LoadedImage, load_image, to_pixels
from qvl_runtime.prompt.limits import ImageLimits

Frozen = Literal["tower", "vit", "nothing"]


class FeatureStore:
    """Image tokens for training. If the whole tower is frozen they are kept; if the resampler is trained, its input is.

    A file is read once a run: later changes of it are not seen.
    """

    def __init__(self, network: Network, max_bytes: int, limits: ImageLimits | None = None) -> None:
        """max_bytes: of what is kept, in host memory; the oldest is dropped first."""
        self.network, self.max_bytes = network, max_bytes
        self.limits = replace(limits or ImageLimits(), isolate_images=False)  # the trainer's own files
        visual = network.visual
        vit = any(parameter.requires_grad for parameter in visual.vit_parameters)
        trained = any(parameter.requires_grad for parameter in visual.parameters())
        self.frozen: Frozen = "nothing" if vit else "vit" if trained else "tower"
        self.hits = self.misses = 0
        self._digests: dict[str, bytes] = {}  # by source, for texts
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self._bytes = 0

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self.network.visual.proj.device

    def __call__(self, sources: Sequence[ImageSource]) -> Tensor:
        """Image tokens [P, queries, D] of these images, with gradients where the encoder is trained.

        Raises `ImageError` or `DownloadError` for an image that cannot be read.
        """
        visual = self.network.visual
        device, dtype = visual.proj.device, visual.proj.dtype
        if self.frozen == "nothing":
            pixels = torch.cat([to_pixels(self._load(source).rgb[None]) for source in sources])
            computed: Tensor = visual(pixels.to(device, dtype))
            return computed
        kept = torch.stack([self._frozen_part(source) for source in sources]).to(device)
        return kept if self.frozen == "tower" else visual.pool(kept)

    def _frozen_part(self, source: ImageSource) -> Tensor:
        digest = self._digests.get(source) if isinstance(source, str) else None
        kept = self._kept.get(digest) if digest is not None else None
        if kept is None:
            image = self._load(source)
            kept = self._kept.get(image.digest)
            if isinstance(source, str):
                self._digests[source] = image.digest
            digest = image.digest
            if kept is None:
                return self._compute(image)
        self.hits += 1
        if digest is not None:
            self._kept.move_to_end(digest)
        return kept

    @torch.no_grad()
    def _compute(self, image: LoadedImage) -> Tensor:
        visual = self.network.visual
        self.misses += 1
        pixels = to_pixels(image.rgb[None]).to(visual.proj.device, visual.proj.dtype)
        result = (visual(pixels) if self.frozen == "tower" else visual.patches(pixels))[0].cpu()
        self._kept[image.digest] = result
        self._bytes += result.nbytes
        while self._bytes > self.max_bytes and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return result

    def _load(self, source: ImageSource) -> LoadedImage:
        return load_image(source, self.network.c.visual.image_size, self.limits)
