"""The paged KV cache: blocks of slots, allocated to sequences and reused by prefix."""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from itertools import accumulate
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from qvl_kernels.memory import PIECE, buffer
from qvl_kernels.reference import cache_width
from qvl_kernels.util import cdiv
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.errors import CapacityError
from qvl_runtime.model.cache_layout import BLOCK_SIZE
from qvl_runtime.model.language import LayerCache, Layout
from qvl_runtime.schedule.block_pool import BlockPool
from qvl_runtime.schedule.prefix_cache import PrefixCache, Root
from qvl_runtime.schedule.sequence import Sequence


class KVCache:
    """A pool of blocks for keys and values, [blocks, H, BLOCK_SIZE, d] for each layer.

    Memory is reserved at once and touched only when used: on a CPU, pages without tokens cost nothing. An additional
    block, `null_block`, belongs to no sequence: rows that pad a step to a fixed size write there.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        prefixes: bool = True,
        heads: int | None = None,
    ) -> None:
        """tokens: rounded up to whole blocks; dtype int8 stores a float32 scale after each vector.

        heads: if the cache is for some of the model's alone.
        """
        blocks = max(1, cdiv(tokens, BLOCK_SIZE))
        shape = (blocks + 1, heads or config.num_attention_heads, BLOCK_SIZE, cache_width(config.kv_channels, dtype))
        self.layers = [
            LayerCache(_allocate_blocks(shape, dtype, device), _allocate_blocks(shape, dtype, device))
            for _ in range(config.num_hidden_layers)
        ]
        self.device, self.null_block = device, blocks
        for layer in self.layers:
            for tensor in layer:
                tensor[self.null_block].zero_()  # padding reads it before it writes it
        self.pool = BlockPool(blocks)
        self.prefixes = PrefixCache(self.pool, BLOCK_SIZE) if prefixes else None
        self._sequences: WeakSet[Sequence] = WeakSet()

    @property
    def num_slots(self) -> int:
        """Capacity in tokens."""
        return self.pool.num_blocks * BLOCK_SIZE

    @property
    def free_tokens(self) -> int:
        """Tokens that fit in free and evictable blocks."""
        return self.pool.available * BLOCK_SIZE

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token in all layers."""
        return sum(t[0].nbytes for layer in self.layers for t in layer) // BLOCK_SIZE

    def sequence(self, alpha: float, salt: str = "", adapter: str | None = None) -> Sequence:
        """Return an empty sequence with NTK factor `alpha`; a `with` block frees its blocks at the end.

        It shares blocks with sequences of the same salt and adapter alone.
        """
        return self.register(Sequence(self, Root(alpha, salt, adapter), BLOCK_SIZE))

    def register(self, sequence: Sequence) -> Sequence:
        """Include a sequence's block table in `check_integrity`, and return the sequence."""
        self._sequences.add(sequence)
        return sequence

    def check_fits_cache(self, tokens: int) -> None:
        """Raise `CapacityError` for a sequence that does not fit even into an empty cache."""
        if tokens > self.num_slots:
            raise CapacityError(
                f"the request needs {tokens} tokens of KV cache, {tokens * self.bytes_per_token / 2**20:,.0f} MiB; the "
                f"cache holds {self.num_slots}: shorten it, raise kv_cache_bytes, or use kv_dtype='int8'"
            )

    def copy_block(self, source: int, target: int) -> None:
        """Copy the content of a block, in every layer."""
        for layer in self.layers:
            for tensor in layer:
                tensor[target] = tensor[source]

    def check_integrity(self) -> None:
        """Raise `RuntimeError` with the first contradiction between pool, prefixes and block tables."""
        published = [] if self.prefixes is None else self.prefixes.blocks
        self.pool.check_integrity([sequence.blocks for sequence in self._sequences], published)
        if self.prefixes is not None:
            self.prefixes.check_integrity()


def _allocate_blocks(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialized tensor of blocks, on a CPU in huge pages: decoding reads a long context 1.13x as fast.

    The null block at the end and small blocks use normal pages: a page of 2 MiB would hold thousands of nano's tokens.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    block = math.prod(shape[1:]) * dtype.itemsize
    huge = (shape[0] - 1) * block if block >= PIECE else 0
    return buffer(shape[0] * block, huge).view(dtype).view(shape)


def layout_of(sequences: Items[Sequence], counts: Items[int]) -> tuple[Tensor, Layout]:
    """Return the positions int64 [n] and the layout of the last counts[r] tokens of each sequence, for one model call.

    The tensors are on the CPU and built in numpy: for 64 sequences, ten times as fast as with small tensors.
    """
    starts = list(accumulate(counts, initial=0))
    tables = np.zeros((len(sequences), max(len(s.blocks) for s in sequences)), np.int64)
    positions, slots = np.empty((2, starts[-1]), np.int64)
    for r, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
        tables[r, : len(sequence.blocks)] = sequence.blocks
        row, first = starts[r], sequence.length - count
        if count == 1:  # decoding: numpy calls for one token would dominate the time
            positions[row] = first
            slots[row] = sequence.blocks[first // BLOCK_SIZE] * BLOCK_SIZE + first % BLOCK_SIZE
            continue
        at = np.arange(first, sequence.length)
        positions[row : row + count] = at
        slots[row : row + count] = tables[r, at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
    at_slots, at_blocks, at_positions = (torch.from_numpy(a) for a in (slots, tables, positions))
    return at_positions, Layout(at_slots, at_blocks, starts, [s.length for s in sequences])
