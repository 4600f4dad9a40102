"""One sequence in the KV cache: its block table, its computed length, and the blocks it publishes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Items
from types import TracebackType
from typing import Protocol

from qvl_kernels.util import cdiv
from qvl_runtime.prompt.chatml import ImageSpan
from qvl_runtime.schedule.block_pool import BlockPool
from qvl_runtime.schedule.prefix_cache import Parent, PrefixCache, Root


class BlockStore(Protocol):
    """The part of the KV cache that a sequence uses."""

    pool: BlockPool
    prefixes: PrefixCache | None

    def register(self, sequence: Sequence) -> Sequence:
        """Include a sequence's block table in the integrity check, and return the sequence."""
        ...

    def copy_block(self, source: int, target: int) -> None:
        """Copy the keys and values of a block, in every layer."""
        ...


class Sequence:
    """The computed part of one answer: `length` tokens in the blocks of its table. `close` resets it to empty."""

    def __init__(self, store: BlockStore, root: Root, block_size: int) -> None:
        self.root = root
        self.length = 0
        self.ahead = 0  # of its last tokens, how many belong to a step that is launched before the last one is taken
        self.blocks: array[int] = array("q")
        self._store, self._size = store, block_size
        self._parents: list[Parent] = [
            root
        ]  # entry i: the parent of block i, for the published blocks and the next one

    @property
    def alpha(self) -> float:
        """The NTK factor that its keys are rotated with."""
        return self.root.alpha

    @property
    def taken(self) -> int:
        """Its computed tokens without those of a step ahead."""
        return self.length - self.ahead

    def needed(self, count: int) -> int:
        """Blocks that `reserve(count)` would allocate."""
        fresh = cdiv(self.length + count, self._size) - len(self.blocks)
        return max(0, fresh) + (1 if self._writes_shared() else 0)

    def reserve(self, count: int) -> None:
        """Allocate the blocks of `count` more tokens. A shared block that is not full is copied first (copy on write).

        Raises `CapacityError`; blocks allocated before the error stay with the sequence.
        """
        pool = self._store.pool
        if self._writes_shared():
            index = self.length // self._size
            copy, shared = pool.allocate(), self.blocks[index]
            self._store.copy_block(shared, copy)
            self.blocks[index] = copy
            pool.release([shared])
        while len(self.blocks) * self._size < self.length + count:
            self.blocks.append(pool.allocate())

    def append(self, count: int) -> None:
        """Extend the sequence by `count` tokens, which the next model call must compute; reserves missing blocks."""
        self.reserve(count)
        self.length += count

    def truncate(self, length: int) -> None:
        """Drop the tokens from `length` on, and release the blocks that held only those."""
        if length < self.length:
            self.length, self.ahead = length, 0
            self._drop(cdiv(length, self._size))

    def find_prefix(self, tokens: Items[int], spans: Items[ImageSpan]) -> int:
        """Start an empty sequence with the cached prefix of a prompt. Returns the number of cached tokens."""
        if self._store.prefixes is None:
            return 0
        self._drop(0)
        hit = self._store.prefixes.match(tokens, spans, self.root)
        self.blocks.extend(hit.blocks)
        self._parents = hit.parents
        self.length = hit.length
        return self.length

    def publish(self, tokens: Items[int], spans: Items[ImageSpan], tail: bool = False) -> None:
        """Publish the full blocks to the prefix cache, and with `tail` also the last block, which is not full.

        tokens: of the whole sequence; the computed ones must not change any more. Those of a step ahead are left out,
        and may be lost with `tail`, which replaces the block that they are in by one of the same content.
        """
        prefixes = self._store.prefixes
        if prefixes is None:
            return
        taken = self.taken
        for index in range(len(self._parents) - 1, taken // self._size):
            node = prefixes.publish(self._parents[index], index, self.blocks[index], tokens, spans)
            self.blocks[index] = node.block
            self._parents.append(node.number)
        index, offset = divmod(taken, self._size)
        if tail and offset and not self._store.pool.is_published(self.blocks[index]):
            node = prefixes.publish(self._parents[index], index, self.blocks[index], tokens[:taken], spans)
            self.blocks[index] = node.block

    def fork(self) -> Sequence:
        """Return a sequence with the same content; the two share blocks until one of them writes."""
        fork = self._store.register(Sequence(self._store, self.root, self._size))
        fork.length, fork.blocks = self.length, self.blocks[: cdiv(self.length, self._size)]
        fork._parents = self._parents.copy()
        for block in fork.blocks:
            self._store.pool.acquire(block)
        return fork

    def close(self) -> None:
        """Release all blocks. Published blocks stay cached until the pool evicts them."""
        self.length = self.ahead = 0
        self._drop(0)

    def _writes_shared(self) -> bool:
        length, size = self.length, self._size
        return length % size > 0 and not self._store.pool.is_exclusive(self.blocks[length // size])

    def _drop(self, keep: int) -> None:
        """Shorten the table to `keep` blocks."""
        self._store.pool.release(self.blocks[keep:])
        del self.blocks[keep:]
        del self._parents[self.length // self._size + 1 :]

    def __enter__(self) -> Sequence:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
