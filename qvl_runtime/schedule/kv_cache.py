"""The KV cache: blocks of slots shared out to sequences, and where the next rows of a sequence go."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import Tensor

from qvl_kernels.reference import cache_width
from qvl_runtime.config import ModelConfig
from qvl_runtime.errors import CapacityError
from qvl_runtime.model.language import LayerCache, Layout

BLOCK_SIZE = 16  # slots: a block of one head is 4 KiB in 16 bits at head size 128


class KVCache:
    """A pool of blocks for keys and values, [blocks, H, BLOCK_SIZE, d] for each layer.

    Memory is reserved at once and touched as it is used: pages that no token reached cost nothing on a CPU.
    """

    def __init__(self, config: ModelConfig, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self.num_blocks = -(-tokens // BLOCK_SIZE)
        shape = (self.num_blocks, config.num_attention_heads, BLOCK_SIZE, cache_width(config.kv_channels, dtype))
        self.layers = [
            LayerCache(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
            for _ in range(config.num_hidden_layers)
        ]
        self.device = device
        self._free = list(range(self.num_blocks - 1, -1, -1))

    @property
    def num_slots(self) -> int:
        return self.num_blocks * BLOCK_SIZE

    @property
    def free_tokens(self) -> int:
        return len(self._free) * BLOCK_SIZE

    @property
    def bytes_per_token(self) -> int:
        k = self.layers[0].k
        return 2 * len(self.layers) * k.shape[1] * k.shape[3] * k.element_size()

    def sequence(self, alpha: float) -> Sequence:
        """A new, empty sequence with its NTK factor; use it in a `with` block, which gives its blocks back."""
        return Sequence(self, alpha)

    def grow(self, blocks: list[int], tokens: int) -> None:
        """Append free blocks to a block table until it holds `tokens`; `CapacityError` where there are too few."""
        missing = -(-tokens // BLOCK_SIZE) - len(blocks)
        if missing > len(self._free):
            raise CapacityError(
                f"the KV cache has {self.free_tokens} free slots of {self.num_slots}, and a request "
                f"needs {missing * BLOCK_SIZE} more: shorten it, or start the engine with a larger max_model_len"
            )
        blocks += [self._free.pop() for _ in range(missing)]

    def release(self, blocks: list[int]) -> None:
        """Take blocks back."""
        self._free += reversed(blocks)
        blocks.clear()


@dataclass(slots=True, eq=False)
class Sequence:
    """The cached part of one request: `length` tokens, in the blocks of its table."""

    cache: KVCache
    alpha: float
    length: int = 0
    blocks: list[int] = field(default_factory=list)

    def append(self, count: int) -> Tensor:
        """Make room for `count` more tokens: their positions, int64 [count]."""
        self.cache.grow(self.blocks, self.length + count)
        positions = torch.arange(self.length, self.length + count, device=self.cache.device)
        self.length += count
        return positions

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on; their blocks stay reserved for what comes instead."""
        self.length = min(self.length, length)

    def close(self) -> None:
        self.cache.release(self.blocks)
        self.length = 0

    def __enter__(self) -> Sequence:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def layout_of(sequences: list[Sequence], positions: list[Tensor]) -> Layout:
    """Where the rows at `positions` of each sequence stand, for one model call."""
    device = positions[0].device
    widest = max(len(s.blocks) for s in sequences)
    tables = torch.tensor([s.blocks + [0] * (widest - len(s.blocks)) for s in sequences], device=device)
    slots = [
        table[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for table, at in zip(tables, positions, strict=True)
    ]
    starts = [0]
    for at in positions:
        starts.append(starts[-1] + len(at))
    return Layout(torch.cat(slots), tables, starts, [s.length for s in sequences])
