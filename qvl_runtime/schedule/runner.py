"""The runner: turns the next tokens of some sequences into the flat tensors of one model call."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import NamedTuple

import torch
from torch import Tensor

from qvl_runtime.model.language import Observer, unobserved
from qvl_runtime.model.qwen_vl import QwenVL, Step
from qvl_runtime.prompt.images import Picture, to_pixels
from qvl_runtime.schedule.image_cache import ImageCache
from qvl_runtime.schedule.kv_cache import KVCache, Sequence, layout_of

PICTURES_AT_ONCE = 8  # more in one pass of the tower cost memory and gain nothing


class Span(NamedTuple):
    """Rows of a chunk that a picture's features replace: the first row, counted in the chunk, and features [m, D]."""

    start: int
    features: Tensor


class Chunk(NamedTuple):
    """The next tokens of one sequence: a whole prompt, a part of it, or one token of an answer."""

    sequence: Sequence
    token_ids: Items[int]
    spans: Items[Span] = ()


class Runner:
    def __init__(self, model: QwenVL, cache: KVCache, images: ImageCache) -> None:
        self.model, self.cache, self.images = model, cache, images

    def features(self, pictures: Items[Picture]) -> list[Tensor]:
        """Features [queries, D] of each picture; those not cached go through the tower together, each once."""
        known: dict[bytes, Tensor] = {}
        missing: dict[bytes, Picture] = {}
        for picture in pictures:
            features = self.images.get(picture.digest)
            if features is None:
                missing[picture.digest] = picture
            else:
                known[picture.digest] = features
        queue = list(missing.values())
        for i in range(0, len(queue), PICTURES_AT_ONCE):
            batch = queue[i : i + PICTURES_AT_ONCE]
            encoded = self.model.encode_pictures(torch.cat([to_pixels(p.rgb[None]) for p in batch]))
            for picture, features in zip(batch, encoded, strict=True):
                known[picture.digest] = features.clone()  # a view would keep the whole batch alive
                self.images.put(picture.digest, known[picture.digest])
        return [known[picture.digest] for picture in pictures]

    def run(self, chunks: Items[Chunk], observe: Observer = unobserved) -> Tensor:
        """Compute the chunks in one model call: residual stream [n, D] of all rows, in order."""
        device = self.model.device
        positions = [chunk.sequence.append(len(chunk.token_ids)) for chunk in chunks]
        layout = layout_of([chunk.sequence for chunk in chunks], positions)
        ids = torch.tensor([t for chunk in chunks for t in chunk.token_ids], device=device)
        rows, features = [], []
        for chunk, start in zip(chunks, layout.query_starts, strict=False):
            for span in chunk.spans:
                rows.append(torch.arange(len(span.features), device=device) + start + span.start)
                features.append(span.features)
        step = Step(
            token_ids=ids,
            positions=torch.cat(positions),
            alphas=[chunk.sequence.alpha for chunk in chunks],
            layout=layout,
            picture_rows=torch.cat(rows) if rows else None,
            picture_features=torch.cat(features) if features else None,
        )
        return self.model.forward(step, self.cache.layers, observe)
