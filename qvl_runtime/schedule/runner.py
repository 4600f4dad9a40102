"""The runner: turns the next tokens of some sequences into the flat tensors of one model call."""

from __future__ import annotations

from collections.abc import Sequence as Items
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qvl_runtime.model.language import Observer, unobserved
from qvl_runtime.model.qwen_vl import QwenVL, Step
from qvl_runtime.prompt.images import Picture, to_pixels
from qvl_runtime.schedule.image_cache import ImageCache
from qvl_runtime.schedule.kv_cache import KVCache, layout_of
from qvl_runtime.schedule.sequence import Sequence

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
        known = {p.digest: self.images.get(p.digest) for p in pictures}
        missing = list({p.digest: p for p in pictures if known[p.digest] is None}.values())
        for start in range(0, len(missing), PICTURES_AT_ONCE):
            batch = missing[start : start + PICTURES_AT_ONCE]
            encoded = self.model.encode_pictures(torch.cat([to_pixels(p.rgb[None]) for p in batch]))
            for picture, features in zip(batch, encoded, strict=True):
                known[picture.digest] = own = features.clone()  # a view would keep the whole batch alive
                self.images.put(picture.digest, own)
        return [features for p in pictures if (features := known[p.digest]) is not None]

    def run(self, chunks: Items[Chunk], observe: Observer = unobserved) -> Tensor:
        """Compute the chunks in one model call: hidden states [n, D] of all rows, in order.

        Where it does not come to an end, Ctrl-C included, the sequences are as they were.
        """
        lengths = [chunk.sequence.length for chunk in chunks]
        try:
            for chunk in chunks:
                chunk.sequence.append(len(chunk.token_ids))
            return self.model.forward(self._step(chunks), self.cache.layers, observe)
        except BaseException:
            for chunk, length in zip(chunks, lengths, strict=True):
                chunk.sequence.truncate(length)
            raise

    def _step(self, chunks: Items[Chunk]) -> Step:
        device, counts = self.model.device, [len(chunk.token_ids) for chunk in chunks]
        positions, layout = layout_of([chunk.sequence for chunk in chunks], counts)
        ids = np.fromiter(chain.from_iterable(chunk.token_ids for chunk in chunks), np.int64, sum(counts))
        rows, features = [], []
        for chunk, start in zip(chunks, layout.query_starts, strict=False):
            for span in chunk.spans:
                rows.append(torch.arange(len(span.features), device=device) + start + span.start)
                features.append(span.features)
        return Step(
            token_ids=torch.from_numpy(ids).to(device),
            positions=positions,
            alphas=[chunk.sequence.alpha for chunk in chunks],
            layout=layout,
            picture_rows=torch.cat(rows) if rows else None,
            picture_features=torch.cat(features) if features else None,
        )
