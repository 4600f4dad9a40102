"""The blocks of the KV cache: reference counts, and least-recently-used eviction of cached blocks."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence

from qvl_runtime.errors import CapacityError


class BlockPool:
    """Allocates blocks by number; it does not know their content.

    A block is free, referenced by one or more sequences, or evictable: published to the prefix cache and referenced by
    none. Evictable blocks are allocated last, the least recently used one first. A published block never changes.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.evictions = 0
        self.on_evict: Callable[[int], None] = lambda block: None  # called with a block before it is evicted
        self._ref_counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._published: set[int] = set()
        self._evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that `allocate` can return, evictable ones included."""
        return len(self._free) + len(self._evictable)

    @property
    def evictable(self) -> int:
        """Blocks that are cached for prefix hits and referenced by no sequence."""
        return len(self._evictable)

    def allocate(self) -> int:
        """Return a block of undefined content with one reference. Raises `CapacityError` if all are referenced."""
        if self._free:
            block = self._free.pop()
        elif self._evictable:
            block, _ = self._evictable.popitem(last=False)
            self._published.discard(block)
            self.evictions += 1
            self.on_evict(block)
        else:
            raise CapacityError(
                f"all {self.num_blocks} blocks of the KV cache are held by running requests: "
                "wait for one to end, or raise kv_cache_bytes"
            )
        self._ref_counts[block] = 1
        return block

    def acquire(self, block: int) -> None:
        """Add a reference to a block that is referenced or evictable."""
        self._evictable.pop(block, None)
        self._ref_counts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each block of a table, given in its order.

        The last block is released first, so that a child is always evicted before its parent.
        """
        for block in reversed(blocks):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if block in self._published:
                    self._evictable[block] = None
                else:
                    self._free.append(block)

    def publish(self, block: int) -> None:
        """Mark a block as immutable; it stays cached when its last reference is dropped."""
        self._published.add(block)

    def is_published(self, block: int) -> bool:
        """Whether the prefix cache knows the block."""
        return block in self._published

    def is_exclusive(self, block: int) -> bool:
        """Whether a block has one reference and is not published, so that it may be written to."""
        return self._ref_counts[block] == 1 and block not in self._published

    def check_integrity(self, tables: Iterable[Sequence[int]], published: Iterable[int]) -> None:
        """Compare the reference counts with the block tables of all sequences and the published blocks.

        Raises `RuntimeError` with the first contradiction. For tests and for finding leaks; the time is
        proportional to the number of blocks.
        """
        references = Counter(block for table in tables for block in table)
        if self._published != set(published):
            raise RuntimeError(
                f"published blocks are {sorted(self._published)}, but the prefix cache holds {sorted(published)}"
            )
        if len(set(self._free)) != len(self._free):
            raise RuntimeError("a block is free twice")
        free, evictable = set(self._free), set(self._evictable)
        for block, count in enumerate(self._ref_counts):
            if count != references[block]:
                raise RuntimeError(f"block {block} counts {count} references, but is in {references[block]} tables")
            expected = (count == 0 and block not in self._published, count == 0 and block in self._published)
            if (block in free, block in evictable) != expected:
                raise RuntimeError(
                    f"block {block} with {count} references is free: {block in free}, evictable: {block in evictable}"
                )
