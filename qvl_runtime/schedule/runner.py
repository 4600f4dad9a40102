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
from qvl_runtime.errors import SamplingError, quoted
from qvl_runtime.formats.host_memory import trim_heap
from qvl_runtime.model.adapters import AdapterRows
from qvl_runtime.model.language import Observer, unobserved
from qvl_runtime.model.qwen_vl import QwenVL, Step
from qvl_runtime.model.rotary import Frequencies
from qvl_runtime.plan.sizes import images_at_once
from qvl_runtime.prompt.images import LoadedImage, to_pixels
from qvl_runtime.schedule.decode_graphs import Capture, DecodeGraphs
from qvl_runtime.schedule.image_cache import ImageCache
from qvl_runtime.schedule.kv_cache import KVCache, layout_of
from qvl_runtime.schedule.prefill_graphs import PrefillGraphs
from qvl_runtime.schedule.readback import to_device
from qvl_runtime.schedule.sequence import Sequence

# Passes of the vision encoder after which the heap's free memory is returned to the OS. Long-lived memory of requests
# is scattered among the activations of steps: with images on nano in float32, holes of 20 MiB after 100 requests and
# 34 MiB after 500, with 111 MiB in use.
TRIM_AFTER = 32
LARGE = 1 << 30  # bytes of a model whose weights take longer to read on a CPU than Python needs for its ops


class Span(NamedTuple):
    """Image features [m, D] that replace the embeddings of a chunk from token `start` of the chunk on."""

    start: int
    features: Tensor


class Chunk(NamedTuple):
    """The next tokens of one sequence: a whole prompt, a part of it, or one token of an answer."""

    sequence: Sequence
    token_ids: Items[int]
    spans: Items[Span] = ()


class Computed:
    """What a step computed: called with indices of its tokens, it gives their logits. Valid until the next step."""

    def __init__(self, rows: Tensor, logits_of: Callable[[Items[int]], Tensor], kept: Items[int] | None = None) -> None:
        """rows [n, any]: of all tokens in order, hidden states or the logits of a decode graph.

        kept: which of them there are, for the others; None: all.
        """
        self._rows, self._logits_of, self._kept = rows, logits_of, kept
        self.is_valid = True  # until the runner computes again

    def __call__(self, indices: Items[int]) -> Tensor:
        """Return the logits of these tokens, [m, vocab]."""
        return self._logits_of(self._of_all(indices))

    def of(self, kept: Items[int]) -> Computed:
        """Return what was computed of some of the tokens."""
        return Computed(self._rows, self._logits_of, self._of_all(kept))

    def _of_all(self, indices: Items[int]) -> Items[int]:
        return indices if self._kept is None else [self._kept[i] for i in indices]

    def are_finite(self, indices: Items[int]) -> list[bool]:
        """Whether the rows of these tokens are finite. If one is not, no later token of its sequence is, either."""
        at = to_device(torch.tensor(self._of_all(indices)), self._rows.device)
        return self._rows[at].isfinite().all(-1).tolist()


class Runner:
    """Runs a model over one KV cache, with an image cache and, if captured, graphs of decoding and of prefill."""

    def __init__(self, model: QwenVL, cache: KVCache, images: ImageCache, notes: Items[str] = ()) -> None:
        """notes: where the weights were read otherwise than their files are labeled, for the report."""
        self.model, self.cache, self.images, self.notes = model, cache, images, tuple(notes)
        self.graphs: DecodeGraphs | None = None
        self.prefill_graphs: PrefillGraphs | None = None
        self._frequencies = Frequencies(model.config, model.device)
        at_once = images_at_once(model.config.visual, model.dtype.itemsize, model.device.type)
        self.images_at_once = 1 if model.batch_invariant else at_once
        self._passes = 0
        self._computed: Computed | None = None  # the latest

    def capture(
        self, capture: Capture, max_batch_size: int, max_seq_len: int, buckets: Items[int] | None = None
    ) -> None:
        """Capture graphs for decoding up to `max_batch_size` sequences of up to `max_seq_len` tokens, and use them."""
        self.graphs = DecodeGraphs(
            self.model, self.cache, self._frequencies, capture, max_batch_size, max_seq_len, buckets
        )

    @property
    def least_forced(self) -> int:
        """How many tokens without a choice, in a row, are worth a step of several tokens, which no graph runs.

        A step op by op costs some 0.5 ms of Python a layer more. Without graphs that is no difference, and little where
        reading the weights takes longer; nano on a CPU lost 15 % of its tokens a second to runs of one and two.
        """
        large = self.model.device.type == "cpu" and sum(self.model.bytes_by_part.values()) > LARGE
        return 1 if self.graphs is None or large else 3

    def capture_prefill(
        self, capture: Capture, max_rows: int, max_seq_len: int, buckets: Items[int] | None = None
    ) -> None:
        """Capture graphs for steps of up to `max_rows` prompt tokens, and use them. `capture`: that of decoding."""
        self.prefill_graphs = PrefillGraphs(
            self.model, self.cache, self._frequencies, capture, max_rows, max_seq_len, buckets
        )

    def features(self, images: Items[LoadedImage]) -> list[Tensor]:
        """Return the features [queries, D] of each image; missing ones are encoded together, each image once."""
        known = {p.digest: self.images.get(p.digest) for p in images}
        missing = list({p.digest: p for p in images if known[p.digest] is None}.values())
        for start in range(0, len(missing), self.images_at_once):
            batch = missing[start : start + self.images_at_once]
            encoded = self.model.encode_images(torch.cat([to_pixels(p.rgb[None]) for p in batch]))
            for image, features in zip(batch, encoded, strict=True):
                known[image.digest] = cached = _copy_outside_heap(features)  # a view would keep the whole batch alive
                self.images.put(image.digest, cached)
            self._passes += 1
            if self._passes % TRIM_AFTER == 0:
                trim_heap()
        return [features for p in images if (features := known[p.digest]) is not None]

    def run(self, chunks: Items[Chunk], observe: Observer = unobserved) -> Tensor:
        """Compute the chunks in one model call, and return the hidden states [n, D] of all tokens in order.

        On any exception, Ctrl-C included, the sequences are restored.
        """
        return self._run(chunks, None, observe)

    def compute(self, chunks: Items[Chunk], tokens: Tensor | None = None) -> Computed:
        """Compute the chunks, by a graph of decoding or of prefill if there is one; adapters run outside of graphs.

        tokens int64 [n], on the model's device: chunks of one token each have these, instead of those that they name.
        """
        decoding = all(
            len(chunk.token_ids) == 1 and not chunk.spans and chunk.sequence.root.adapter is None for chunk in chunks
        )
        if self.graphs is None or not decoding or not self.graphs.can_run(len(chunks)):
            hidden = self._prefill(chunks) if tokens is None else self._run(chunks, tokens)
            return self._latest(hidden, lambda i: self.model.logits(hidden[to_device(torch.tensor(i), hidden.device)]))
        self._forget()
        with _appended(chunks):
            logits = self.graphs.run([c.sequence for c in chunks], [c.token_ids[0] for c in chunks], tokens)
        every_row = [*range(len(logits))]

        def logits_of(indices: Items[int]) -> Tensor:
            return logits if [*indices] == every_row else logits[to_device(torch.tensor(indices), logits.device)]

        return self._latest(logits, logits_of)

    def _latest(self, rows: Tensor, logits_of: Callable[[Items[int]], Tensor]) -> Computed:
        self._computed = computed = Computed(rows, logits_of)
        return computed

    def _forget(self) -> None:
        """Before a model call: what the last one left may be overwritten."""
        if self._computed is not None:
            self._computed.is_valid, self._computed = False, None

    def _run(self, chunks: Items[Chunk], tokens: Tensor | None, observe: Observer = unobserved) -> Tensor:
        self._forget()
        with _appended(chunks):
            return self.model.forward(self._step(chunks, tokens), self.cache.layers, observe)

    def _prefill(self, chunks: Items[Chunk]) -> Tensor:
        graphs, counts = self.prefill_graphs, [len(chunk.token_ids) for chunk in chunks]
        if graphs is None:
            return self.run(chunks)
        if any(chunk.sequence.root.adapter is not None for chunk in chunks) or not graphs.can_run(counts):
            graphs.eager_steps += 1
            return self.run(chunks)
        self._forget()
        with _appended(chunks):
            return graphs.run([c.sequence for c in chunks], counts, self.model.embed(self._step(chunks)))

    def _step(self, chunks: Items[Chunk], tokens: Tensor | None = None) -> Step:
        device, counts = self.model.device, [len(chunk.token_ids) for chunk in chunks]
        positions, layout = layout_of([chunk.sequence for chunk in chunks], counts)
        if tokens is None:
            ids = np.fromiter(chain.from_iterable(chunk.token_ids for chunk in chunks), np.int64, sum(counts))
            tokens = to_device(torch.from_numpy(ids), self.model.decoder.embedding.device)
        factors = np.repeat([self._frequencies.row(chunk.sequence.alpha) for chunk in chunks], counts)
        rows, features = [], []
        for chunk, end in zip(chunks, accumulate(counts), strict=True):
            start = end - len(chunk.token_ids)
            for span in chunk.spans:
                rows.append(torch.arange(len(span.features), device=device) + start + span.start)
                features.append(span.features)
        return Step(
            token_ids=tokens,
            positions=to_device(positions, device),
            frequencies=self._frequencies.table[to_device(torch.from_numpy(factors), device)],
            layout=layout._replace(
                slots=to_device(layout.slots, device), block_tables=to_device(layout.block_tables, device)
            ),
            image_indices=torch.cat(rows) if rows else None,
            image_features=torch.cat(features) if features else None,
            adapters=self._adapter_rows(chunks),
        )

    def checked_adapter(self, name: str | None) -> str | None:
        """Return the name of an adapter. Raises `SamplingError` if there is none of that name."""
        loaded = () if self.model.adapters is None else self.model.adapters.names
        if name is not None and name not in loaded:
            known = ", ".join(map(quoted, loaded)) or "none: pass adapters={name: folder} to Engine"
            raise SamplingError(f"adapter is {quoted(name)}; the adapters of this engine are {known}")
        return name

    def _adapter_rows(self, chunks: Items[Chunk]) -> list[AdapterRows]:
        """Which rows of a step use which adapter."""
        adapters, rows, start = self.model.adapters, dict[int, list[int]](), 0
        for chunk in chunks:
            name, end = chunk.sequence.root.adapter, start + len(chunk.token_ids)
            if name is not None and adapters is not None:
                rows.setdefault(adapters.index(name), []).extend(range(start, end))
            start = end
        device = self.model.device
        return [AdapterRows(index, to_device(torch.tensor(own), device)) for index, own in rows.items()]


def _copy_outside_heap(features: Tensor) -> Tensor:
    """Copy features for the image cache, on a CPU into a memory mapping of their own.

    In the heap, long-lived copies among the activations of a step would leave holes that no other step fits.
    """
    if features.device.type != "cpu":
        return features.clone()
    return mapping(features.nbytes).view(features.dtype).view(features.shape).copy_(features)


@contextmanager
def _appended(chunks: Items[Chunk]) -> Iterator[None]:
    """Extend the sequences by the tokens of a step; on any exception, Ctrl-C included, restore them."""
    lengths = [chunk.sequence.length for chunk in chunks]
    try:
        for chunk in chunks:
            chunk.sequence.append(len(chunk.token_ids))
        yield
    except BaseException:
        for chunk, length in zip(chunks, lengths, strict=True):
            chunk.sequence.truncate(length)
        raise
