"""The runner: turns the next tokens of some sequences into the flat tensors of one model call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qvl_kernels.memory import mapping
from qvl_runtime.formats.host_memory import trim_heap
from qvl_runtime.model.language import Observer, unobserved
from qvl_runtime.model.qwen_vl import QwenVL, Step
from qvl_runtime.model.rotary import Frequencies
from qvl_runtime.plan.sizes import images_at_once
from qvl_runtime.prompt.images import LoadedImage, to_pixels
from qvl_runtime.schedule.decode_graphs import Capture, DecodeGraphs
from qvl_runtime.schedule.image_cache import ImageCache
from qvl_runtime.schedule.kv_cache import KVCache, layout_of
from qvl_runtime.schedule.sequence import Sequence

# Passes of the tower after which the heap's free memory is given back. What requests keep lies between the activations
# of steps of all sizes: with images on nano in float32 20 MiB of holes after 100 requests, 34 after 500; 111 in use.
TRIM_AFTER = 32


class Span(NamedTuple):
    """Rows of a chunk that an image's features replace: the first row, counted in the chunk, and features [m, D]."""

    start: int
    features: Tensor


class Chunk(NamedTuple):
    """The next tokens of one sequence: a whole prompt, a part of it, or one token of an answer."""

    sequence: Sequence
    token_ids: Items[int]
    spans: Items[Span] = ()


LogitsOf = Callable[[Items[int]], Tensor]  # rows of a step, by number, to their logits [m, vocab]


class Runner:
    def __init__(self, model: QwenVL, cache: KVCache, images: ImageCache) -> None:
        self.model, self.cache, self.images = model, cache, images
        self.graphs: DecodeGraphs | None = None
        self._frequencies = Frequencies(model.config, model.device)
        self.images_at_once = images_at_once(model.config.visual, model.dtype.itemsize, model.device.type)
        self._passes = 0

    def capture(
        self, capture: Capture, max_batch_size: int, max_seq_len: int, buckets: Items[int] | None = None
    ) -> None:
        """Capture graphs for decoding up to `max_batch_size` sequences of up to `max_seq_len` tokens, and use them."""
        self.graphs = DecodeGraphs(
            self.model, self.cache, self._frequencies, capture, max_batch_size, max_seq_len, buckets
        )

    def features(self, images: Items[LoadedImage]) -> list[Tensor]:
        """Features [queries, D] of each image; those not cached go through the tower together, each once."""
        known = {p.digest: self.images.get(p.digest) for p in images}
        missing = list({p.digest: p for p in images if known[p.digest] is None}.values())
        for start in range(0, len(missing), self.images_at_once):
            batch = missing[start : start + self.images_at_once]
            encoded = self.model.encode_images(torch.cat([to_pixels(p.rgb[None]) for p in batch]))
            for image, features in zip(batch, encoded, strict=True):
                known[image.digest] = own = _apart(features)  # a view would keep the whole batch alive
                self.images.put(image.digest, own)
            self._passes += 1
            if self._passes % TRIM_AFTER == 0:
                trim_heap()
        return [features for p in images if (features := known[p.digest]) is not None]

    def run(self, chunks: Items[Chunk], observe: Observer = unobserved) -> Tensor:
        """Compute the chunks in one model call: hidden states [n, D] of all rows, in order.

        Where it does not come to an end, Ctrl-C included, the sequences are as they were.
        """
        with _grown(chunks):
            return self.model.forward(self._step(chunks), self.cache.layers, observe)

    def compute(self, chunks: Items[Chunk]) -> LogitsOf:
        """The same for a step of the loop, by a graph where there is one: gives the way to the logits of its rows.

        What that gives holds until the next step.
        """
        decoding = all(len(chunk.token_ids) == 1 and not chunk.spans for chunk in chunks)
        if self.graphs is None or not decoding or not self.graphs.can_run(len(chunks)):
            hidden = self.run(chunks)
            return lambda at: self.model.logits(hidden[torch.tensor(at, device=hidden.device)])
        with _grown(chunks):
            logits = self.graphs.run([c.sequence for c in chunks], [c.token_ids[0] for c in chunks])
        return lambda at: logits if at == [*range(len(logits))] else logits[torch.tensor(at, device=logits.device)]

    def _step(self, chunks: Items[Chunk]) -> Step:
        device, counts = self.model.device, [len(chunk.token_ids) for chunk in chunks]
        positions, layout = layout_of([chunk.sequence for chunk in chunks], counts)
        ids = np.fromiter(chain.from_iterable(chunk.token_ids for chunk in chunks), np.int64, sum(counts))
        factors = np.repeat([self._frequencies.row(chunk.sequence.alpha) for chunk in chunks], counts)
        rows, features = [], []
        for chunk, end in zip(chunks, accumulate(counts), strict=True):
            start = end - len(chunk.token_ids)
            for span in chunk.spans:
                rows.append(torch.arange(len(span.features), device=device) + start + span.start)
                features.append(span.features)
        return Step(
            token_ids=torch.from_numpy(ids).to(self.model.decoder.embedding.device),
            positions=positions.to(device),
            frequencies=self._frequencies.table[torch.from_numpy(factors).to(device)],
            layout=layout._replace(slots=layout.slots.to(device), block_tables=layout.block_tables.to(device)),
            image_rows=torch.cat(rows) if rows else None,
            image_features=torch.cat(features) if features else None,
        )


def _apart(features: Tensor) -> Tensor:
    """A copy that may be kept for long: on a CPU in a mapping of its own.

    In the heap it would lie between the activations of a step, and leave holes there that no other step fits.
    """
    if features.device.type != "cpu":
        return features.clone()
    return mapping(features.nbytes).view(features.dtype).view(features.shape).copy_(features)


@contextmanager
def _grown(chunks: Items[Chunk]) -> Iterator[None]:
    """The sequences with the tokens of a step; where it does not come to an end, Ctrl-C included, as they were."""
    lengths = [chunk.sequence.length for chunk in chunks]
    try:
        for chunk in chunks:
            chunk.sequence.append(len(chunk.token_ids))
        yield
    except BaseException:
        for chunk, length in zip(chunks, lengths, strict=True):
            chunk.sequence.truncate(length)
        raise
