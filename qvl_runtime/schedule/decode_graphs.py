"""Decode graphs: decode steps captured once for each bucket of batch sizes, over static buffers.

A decode step of the full model has about 300 kernel launches. Launched one by one from Python, their overhead exceeds
the kernel time: a launch costs 2 to 4 microseconds on an A100, a layer's smaller kernels run for 6. A graph launches
them all at once. On a CPU, Python's overhead is 18 of 230 ms, and a graph is a list of kernel calls.

A graph replays fixed addresses and shapes, so a step fills the buffers of the smallest bucket that holds it. Rows
without a request are padding: they read and write the cache's null block, which no sequence uses, and are ignored.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from qvl_kernels.util import cdiv
from qvl_runtime.model.cache_layout import BLOCK_SIZE
from qvl_runtime.model.language import Layout
from qvl_runtime.model.qwen_vl import QwenVL, Step
from qvl_runtime.model.rotary import Frequencies
from qvl_runtime.schedule.kv_cache import KVCache
from qvl_runtime.schedule.readback import Moment
from qvl_runtime.schedule.sequence import Sequence

_log = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, *range(16, 257, 8))  # batch sizes; max_batch_size is another
COLUMNS = 5  # int64 inputs of a row besides its block table


class Graph(Protocol):
    """A function over static buffers; each call overwrites the result of the previous one."""

    @property
    def fallback_reason(self) -> str | None:
        """Why it runs op by op, known once it has run; None if it is captured."""
        ...

    def __call__(self) -> Tensor:
        """Run the function over the current content of its buffers."""
        ...


class Captured(NamedTuple):
    """A graph that was captured ahead of time: each `replay` overwrites `output`."""

    replay: Callable[[], None]
    output: Tensor

    @property
    def fallback_reason(self) -> str | None:
        """None: it is captured."""
        return None

    def __call__(self) -> Tensor:
        """Replay the graph and return its output."""
        self.replay()
        return self.output


class Capture(Protocol):
    """Captures a function that reads and writes static tensors only, and whose launches depend on no value."""

    def __call__(self, function: Callable[[], Tensor]) -> Graph:
        """Capture `function`, now or when it first runs."""
        ...

    @property
    def nbytes(self) -> int | None:
        """Bytes that all its graphs hold; None if they are not counted."""
        ...


class HostEmbedding:
    """Looks up embeddings in a table in host memory, and copies them to the static buffer that graphs read."""

    def __init__(self, table: Tensor, max_batch_size: int, device: torch.device) -> None:
        self._table = table
        self._gathered = torch.empty(
            max_batch_size, table.shape[1], dtype=table.dtype, pin_memory=device.type == "cuda"
        )
        self._sent = self._gathered.to(device)  # on a CPU the same tensor

    def rows(self, count: int) -> Tensor:
        """Return the static buffer of the first `count` embeddings, [count, D] on the device."""
        return self._sent[:count]

    def send(self, token_ids: Tensor) -> None:
        """Look up ids int64 [n] on the host and start copying. The previous copy must have completed."""
        n = len(token_ids)
        torch.index_select(self._table, 0, token_ids, out=self._gathered[:n])
        if self._sent is not self._gathered:
            self._sent[:n].copy_(self._gathered[:n], non_blocking=True)


class DecodeInputs:
    """The static inputs of a decode step of `rows` rows: packed int64, so that one copy moves them to the device.

    If the embedding table is on the host, the inputs include the embeddings.
    """

    def __init__(self, rows: int, host: Tensor, device: Tensor, host_embedding: HostEmbedding | None = None) -> None:
        """host, device: flat buffers of the same size, of rows * (COLUMNS + blocks of a table) int64."""
        self.rows, self._host, self._device, self._host_embedding = rows, host, device, host_embedding
        self.inputs_embeds = None if host_embedding is None else host_embedding.rows(rows)
        self._ids = self._parts(host)[0][0]
        self._columns, self._tables = (part.numpy() for part in self._parts(host))
        columns, self.block_tables = self._parts(device)  # on a CPU, `device` is `host` itself
        self.token_ids, self.positions, self.slots, self.context_lens, self.frequency_rows = columns
        self.query_starts = torch.arange(rows + 1, device=device.device)

    def _parts(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        end = COLUMNS * self.rows
        return buffer[:end].view(COLUMNS, self.rows), buffer[end:].view(self.rows, -1)

    def send(
        self,
        sequences: Items[Sequence],
        token_ids: Items[int],
        frequency_rows: Items[int],
        null_block: int,
        tokens: Tensor | None = None,
    ) -> None:
        """Fill the inputs with the last token of each sequence and with padding on `null_block`; copy to the device.

        The previous copy must have completed. tokens int64 [n]: those tokens, if they are known on the device alone.
        """
        n = len(sequences)
        for row, (sequence, token, factor) in enumerate(zip(sequences, token_ids, frequency_rows, strict=True)):
            at, blocks = sequence.length - 1, sequence.blocks
            slot = blocks[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
            self._columns[:, row] = token, at, slot, sequence.length, factor
            self._tables[row, : len(blocks)] = blocks
        for row in range(n, self.rows):
            self._columns[:, row] = 0, 0, null_block * BLOCK_SIZE + row % BLOCK_SIZE, 1, 0
        self._tables[n:, 0] = null_block
        if self._device is not self._host:
            self._device.copy_(self._host, non_blocking=True)
        if tokens is not None:
            self.token_ids[:n].copy_(tokens)
        if self._host_embedding is not None:
            self._host_embedding.send(self._ids)


class Bucket(NamedTuple):
    """The decode step of one batch size, padding included."""

    inputs: DecodeInputs
    graph: Graph  # returns logits, or hidden states if `with_head` is false
    with_head: bool


class DecodeGraphs:
    """The decode graphs of a model over one KV cache, for up to `max_batch_size` sequences of `max_seq_len` tokens.

    Larger batches run without a graph. If a step cannot be captured, it is captured without the head: a head may
    run in torch, such as one whose dtype its kernel does not support, whatever kernels the blocks use.
    """

    def __init__(
        self,
        model: QwenVL,
        cache: KVCache,
        frequencies: Frequencies,
        capture: Capture,
        max_batch_size: int,
        max_seq_len: int,
        buckets: Items[int] | None = None,
    ) -> None:
        """Capture every bucket, the largest first, so that the smaller ones reuse its memory.

        buckets: batch sizes; None for `BUCKETS`.
        """
        self.replays = 0
        buckets = BUCKETS if buckets is None else buckets
        max_batch_size = min(max_batch_size, buckets[-1])
        self._model, self._cache, self._frequencies, self._capture = model, cache, frequencies, capture
        self._max_batch_size = max_batch_size
        width = COLUMNS + cdiv(max_seq_len, BLOCK_SIZE)
        on_gpu = model.device.type == "cuda"
        # pinned: copies from pageable memory would block
        host = torch.zeros(max_batch_size * width, dtype=torch.int64, pin_memory=on_gpu)
        device = host.to(model.device)
        host_embedding = (
            HostEmbedding(model.decoder.embedding, max_batch_size, model.device) if model.embedding_on_host else None
        )
        self._sent = Moment(model.device)  # the last copy of inputs
        self.buckets = (*buckets[: bisect_left(buckets, max_batch_size)], max_batch_size)
        self._buckets: dict[int, Bucket] = {}
        frequencies.row(1.0)  # row 0, read by padding
        for rows in reversed(self.buckets):
            on_host = host[: rows * width]
            inputs = DecodeInputs(rows, on_host, on_host if device is host else device[: rows * width], host_embedding)
            inputs.send((), (), (), cache.null_block)
            self._buckets[rows] = self._capture_bucket(inputs)

    def can_run(self, rows: int) -> bool:
        """Whether a decode step of `rows` rows has a graph, or may still get one."""
        return rows <= self._max_batch_size and self._bucket(rows).graph.fallback_reason is None

    def run(self, sequences: Items[Sequence], token_ids: Items[int], tokens: Tensor | None = None) -> Tensor:
        """Return the logits [n, vocab] of the last token of each sequence, valid until the next call.

        tokens int64 [n], on the model's device: those tokens, instead of `token_ids`. Their embeddings must be there.
        """
        inputs, graph, with_head = bucket = self._bucket(len(sequences))
        rows = [self._frequencies.row(sequence.alpha) for sequence in sequences]
        self._sent.wait()
        inputs.send(sequences, token_ids, rows, self._cache.null_block, tokens)
        self._sent.mark()
        result = graph()
        if graph.fallback_reason is None:
            self.replays += 1
        else:
            self._retry_without_head(bucket, graph.fallback_reason)
        return (result if with_head else self._model.logits(result))[: len(sequences)]

    def report(self) -> dict[str, Any]:
        """Return the captured batch sizes, replays, bytes, and the batch sizes without a graph and why."""
        fallback_reasons = {
            rows: bucket.graph.fallback_reason for rows, bucket in self._buckets.items() if bucket.graph.fallback_reason
        }
        return {
            "rows": [rows for rows in self.buckets if rows not in fallback_reasons],
            "without_head": [
                rows for rows in self.buckets if rows not in fallback_reasons and not self._buckets[rows].with_head
            ],
            "replays": self.replays,
            "bytes": self._capture.nbytes,
            "refused": fallback_reasons,
        }

    def _bucket(self, rows: int) -> Bucket:
        return self._buckets[self.buckets[bisect_left(self.buckets, rows)]]

    def _capture_bucket(self, inputs: DecodeInputs, with_head: bool = True) -> Bucket:
        return Bucket(inputs, self._capture(self._step(inputs, with_head)), with_head)

    def _retry_without_head(self, bucket: Bucket, reason: str) -> None:
        rows = bucket.inputs.rows
        if bucket.with_head:
            self._buckets[rows] = self._capture_bucket(bucket.inputs, with_head=False)
        else:
            _log.info("decode steps of %d rows have no graph: %s", rows, reason)

    def _step(self, inputs: DecodeInputs, with_head: bool) -> Callable[[], Tensor]:
        model, table, layers = self._model, self._frequencies.table, self._cache.layers
        layout = Layout(inputs.slots, inputs.block_tables, inputs.query_starts, inputs.context_lens)

        def step() -> Tensor:
            frequencies = model.ops.embedding(inputs.frequency_rows, table)
            rows = Step(inputs.token_ids, inputs.positions, frequencies, layout, inputs_embeds=inputs.inputs_embeds)
            hidden = model.forward(rows, layers)
            return model.logits(hidden) if with_head else hidden

        return step
