"""Decoding as captured graphs: one for each bucket of batch sizes, over buffers that never move.

A decode step of the full model is some 300 launches; queued one by one from Python they take longer than they run (2 to
4 microseconds each on an A100, against 6 for a layer's smaller kernels). A graph holds them all and is queued at once.
It repeats addresses and shapes as they were, so a step fills the buffers of the smallest bucket that holds it. Rows
without a request are padding: they read and write the cache's spare block, which belongs to nobody, and are ignored.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from qvl_runtime.model.language import Layout
from qvl_runtime.model.qwen_vl import QwenVL, Step
from qvl_runtime.model.rotary import Frequencies
from qvl_runtime.schedule.kv_cache import BLOCK_SIZE, KVCache, layout_of
from qvl_runtime.schedule.sequence import Sequence

BUCKETS = (1, 2, 4, 8, *range(16, 257, 8))  # of rows; the most rows that are allowed have one of their own
COLUMNS = 5  # numbers that a row has beside its block table


class Captured(NamedTuple):
    """A function over static buffers, captured: each `replay` computes `output` anew, in place."""

    replay: Callable[[], None]
    output: Tensor


class Capture(Protocol):
    """Captures a function that reads and writes static tensors only, and whose launches depend on no value."""

    def __call__(self, function: Callable[[], Tensor]) -> Captured: ...


class Inputs:
    """What a decode step of `rows` rows reads, all int64, packed so that one copy brings it to the device."""

    def __init__(self, rows: int, host: Tensor, device: Tensor) -> None:
        """host, device: flat buffers of the same size, for rows * (COLUMNS + blocks of a table) numbers."""
        self.rows, self._host, self._device = rows, host, device
        columns, self.block_tables = self._parts(device)
        self.token_ids, self.positions, self.slots, self.context_lens, self.frequency_rows = columns
        self.query_starts = torch.arange(rows + 1, device=device.device)

    def _parts(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        end = COLUMNS * self.rows
        return buffer[:end].view(COLUMNS, self.rows), buffer[end:].view(self.rows, -1)

    def send(self, sequences: Items[Sequence], token_ids: Items[int], frequency_rows: Items[int], spare: int) -> None:
        """Fill with the last token of each sequence, and with padding that lives in block `spare`; copy to the device.

        The last copy must have arrived: it has, where the tokens of the last step have been read.
        """
        columns, tables = (part.numpy() for part in self._parts(self._host))
        n = len(sequences)
        if n:
            positions, layout = layout_of(sequences, [1] * n)
            values = (token_ids, positions, layout.slots, layout.context_lens, frequency_rows)
            for column, own in zip(columns, values, strict=True):
                column[:n] = own
            tables[:n, : layout.block_tables.shape[1]] = layout.block_tables
        for row in range(n, self.rows):
            columns[:, row] = 0, 0, spare * BLOCK_SIZE + row % BLOCK_SIZE, 1, 0
        tables[n:, 0] = spare
        self._device.copy_(self._host, non_blocking=True)


class DecodeGraphs:
    """The decode steps of a model over one KV cache, for up to `most` sequences of up to `longest` tokens.

    More than the last bucket of sequences are decoded without a graph.
    """

    def __init__(
        self, model: QwenVL, cache: KVCache, frequencies: Frequencies, capture: Capture, most: int, longest: int
    ) -> None:
        """Captures every bucket at once, the largest first, so that the smaller ones find its memory to use."""
        self.replays = 0
        most = min(most, BUCKETS[-1])
        self._cache, self._frequencies, self._most = cache, frequencies, most
        width = COLUMNS + -(-longest // BLOCK_SIZE)
        on_gpu = model.device.type == "cuda"
        host = torch.zeros(most * width, dtype=torch.int64, pin_memory=on_gpu)  # pinned, or the copy would wait
        device = host.to(model.device, copy=True)
        self.buckets = (*BUCKETS[: bisect_left(BUCKETS, most)], most)
        self._graphs: dict[int, tuple[Inputs, Captured]] = {}
        frequencies.row(1.0)  # row 0, which padding reads
        for rows in reversed(self.buckets):
            inputs = Inputs(rows, host[: rows * width], device[: rows * width])
            inputs.send((), (), (), cache.spare)
            self._graphs[rows] = inputs, capture(self._step(model, inputs))

    def take(self, rows: int) -> bool:
        """Whether a decode step of so many rows has a graph."""
        return rows <= self._most

    def run(self, sequences: Items[Sequence], token_ids: Items[int]) -> Tensor:
        """Compute the last token of each sequence: logits [n, vocab], which hold until the next call."""
        inputs, captured = self._graphs[self.buckets[bisect_left(self.buckets, len(sequences))]]
        rows = [self._frequencies.row(sequence.alpha) for sequence in sequences]
        inputs.send(sequences, token_ids, rows, self._cache.spare)
        captured.replay()
        self.replays += 1
        return captured.output[: len(sequences)]

    def _step(self, model: QwenVL, inputs: Inputs) -> Callable[[], Tensor]:
        table, layers = self._frequencies.table, self._cache.layers
        layout = Layout(inputs.slots, inputs.block_tables, inputs.query_starts, inputs.context_lens)

        def step() -> Tensor:
            step = Step(inputs.token_ids, inputs.positions, table[inputs.frequency_rows], layout)
            return model.logits(model.forward(step, layers))

        return step
