"""Prefill graphs: steps of a few hundred prompt tokens captured once for each bucket of row counts.

Such a step has some 320 launches of 2 to 10 microseconds, and Python needs 20 to 200 for each: on an H100 a prompt of
32 to 512 tokens took 22 to 26 ms whatever its length. A replay launches them all at once. Longer steps keep the GPU
busy for longer than Python needs, and run without a graph.

A step fills the static buffers of the smallest bucket that holds it. Rows without a token are padding: they write to
the cache's null block, belong to no request, and are ignored.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qvl_kernels.util import cdiv
from qvl_runtime.model.cache_layout import BLOCK_SIZE
from qvl_runtime.model.language import Layout
from qvl_runtime.model.qwen_vl import QwenVL, Step
from qvl_runtime.model.rotary import Frequencies
from qvl_runtime.schedule.decode_graphs import Capture, Graph
from qvl_runtime.schedule.kv_cache import KVCache, layout_of
from qvl_runtime.schedule.sequence import Sequence

_log = logging.getLogger(__name__)

# Rows. No bucket lies between a row count and the tiles of 64 or 128 rows that it fills, so that the kernels divide a
# step of this many rows, padded or not, in the same way and add in the same order.
BUCKETS = (16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512)
MOST_REQUESTS = 8  # prompts in a step; fewer than the rows of any bucket
LEAST_ROWS = 5  # of a request: those with fewer rows attend by the kernel for decoding
COLUMNS = 3  # int64 inputs of a row


class PrefillInputs:
    """The static inputs of a step of `rows` rows and up to MOST_REQUESTS requests, on host and device."""

    def __init__(self, rows: int, blocks: int, embeds: Tensor) -> None:
        """blocks: of the longest sequence; embeds: the buffer of the decoder's input, [at least rows, D]."""
        self.rows, device = rows, embeds.device
        sizes = (COLUMNS * rows, MOST_REQUESTS + 1, MOST_REQUESTS, MOST_REQUESTS * blocks)
        self._host = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = self._host.to(device, copy=True)
        self._columns, self._starts, self._lengths, self._tables = _views(self._host, sizes)
        columns, self.query_starts, self.context_lens, self.block_tables = _views(self._device, sizes)
        self.positions, self.slots, self.frequency_rows = columns
        self.inputs_embeds = embeds[:rows]

    def send(
        self,
        sequences: Items[Sequence],
        counts: Items[int],
        frequency_rows: Items[int],
        embeds: Tensor | None,
        null_block: int,
    ) -> None:
        """Fill the buffers with the last counts[r] tokens of each sequence, [n, D] embeddings, and padding.

        The copy is complete when this returns, as the next step may come before the GPU has finished this one.
        """
        used = sum(counts)
        self._starts.fill_(used)
        self._starts[0] = 0
        self._lengths.zero_()
        self._columns.zero_()
        self._columns[1, used:] = null_block * BLOCK_SIZE + torch.arange(self.rows - used) % BLOCK_SIZE
        if embeds is not None:
            positions, layout = layout_of(sequences, counts)
            self._columns[0, :used], self._columns[1, :used] = positions, layout.slots
            self._columns[2, :used] = torch.tensor(frequency_rows).repeat_interleave(torch.tensor(counts))
            self._starts[: len(counts) + 1] = torch.tensor(layout.query_starts)
            self._lengths[: len(counts)] = torch.tensor(layout.context_lens)
            self._tables[: len(counts), : layout.block_tables.shape[1]] = layout.block_tables
            self.inputs_embeds[:used].copy_(embeds)
        self._device.copy_(self._host)


class Bucket(NamedTuple):
    """The prefill of one row count, padding included."""

    inputs: PrefillInputs
    graph: Graph  # returns hidden states


class PrefillGraphs:
    """The prefill graphs of a model over one KV cache, for sequences of up to `max_seq_len` tokens."""

    def __init__(
        self,
        model: QwenVL,
        cache: KVCache,
        frequencies: Frequencies,
        capture: Capture,
        max_rows: int,
        max_seq_len: int,
        buckets: Items[int] | None = None,
    ) -> None:
        """Capture every bucket of at most `max_rows` rows, the largest first, so that smaller ones reuse its memory.

        If one cannot be captured, its steps and those of smaller buckets run without a graph, with a warning.
        """
        self.replays, self.eager_steps = 0, 0
        self.refused: dict[int, str] = {}
        self._model, self._cache, self._frequencies, self._capture = model, cache, frequencies, capture
        self.buckets = tuple(rows for rows in buckets or BUCKETS if rows <= max_rows)
        self._buckets: dict[int, Bucket] = {}
        width = model.config.hidden_size
        embeds = torch.zeros(max(self.buckets, default=0), width, dtype=model.dtype, device=model.device)
        frequencies.row(1.0)  # row 0, read by padding
        for rows in reversed(self.buckets):
            inputs = PrefillInputs(rows, cdiv(max_seq_len, BLOCK_SIZE), embeds)
            inputs.send((), (), (), None, cache.null_block)
            try:
                self._buckets[rows] = Bucket(inputs, capture(self._step(inputs)))
            except RuntimeError as fault:  # torch's own, out of memory included
                self.refused[rows] = str(fault).splitlines()[0]
                _log.warning(
                    "prompts of up to %d tokens run without CUDA graphs, some 20 ms slower: %s",
                    rows,
                    self.refused[rows],
                )
                break

    def can_run(self, counts: Items[int]) -> bool:
        """Whether a step of `counts` tokens of each request has a graph; one with a request that decodes has none."""
        if len(counts) > MOST_REQUESTS or min(counts) < LEAST_ROWS:
            return False
        at = bisect_left(self.buckets, sum(counts))
        return at < len(self.buckets) and self.buckets[at] in self._buckets

    @torch.inference_mode()
    def run(self, sequences: Items[Sequence], counts: Items[int], embeds: Tensor) -> Tensor:
        """Return the hidden states [n, D] of the last counts[r] tokens of each sequence, valid until the next call."""
        used = sum(counts)
        inputs, graph = self._buckets[self.buckets[bisect_left(self.buckets, used)]]
        rows = [self._frequencies.row(sequence.alpha) for sequence in sequences]
        inputs.send(sequences, counts, rows, embeds, self._cache.null_block)
        self.replays += 1
        return graph()[:used]

    def report(self) -> dict[str, Any]:
        """Return the captured row counts, the steps that they ran, the others, and what could not be captured."""
        return {
            "rows": sorted(self._buckets),
            "replays": self.replays,
            "steps_without": self.eager_steps,
            "refused": self.refused,
        }

    def _step(self, inputs: PrefillInputs) -> Callable[[], Tensor]:
        model, table, layers = self._model, self._frequencies.table, self._cache.layers
        layout = Layout(inputs.slots, inputs.block_tables, inputs.query_starts, inputs.context_lens)

        def step() -> Tensor:
            frequencies = model.ops.embedding(inputs.frequency_rows, table)
            rows = Step(inputs.slots, inputs.positions, frequencies, layout, inputs_embeds=inputs.inputs_embeds)
            return model.forward(rows, layers)

        return step


def _views(buffer: Tensor, sizes: Items[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The columns [COLUMNS, rows], starts, lengths and tables [MOST_REQUESTS, blocks] of a buffer."""
    columns, starts, lengths, tables = torch.split(buffer, list(sizes))
    return columns.view(COLUMNS, -1), starts, lengths, tables.view(MOST_REQUESTS, -1)
