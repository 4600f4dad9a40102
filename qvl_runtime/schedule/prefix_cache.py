"""Finding the blocks that hold the beginning of a prompt, by exact comparison of everything they depend on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from qvl_runtime.prompt.chatml import ImageSpan
from qvl_runtime.schedule.block_pool import BlockPool


class Root(NamedTuple):
    """What all blocks of a sequence depend on: keys are cached rotated by alpha, and a salt keeps tenants apart."""

    alpha: float
    salt: str


Parent: TypeAlias = "int | Root"
Images: TypeAlias = tuple[tuple[int, bytes], ...]  # first row counted from the block's own, and digest


class Key(NamedTuple):
    """Compared as a whole: two blocks are the same only if all of this is equal."""

    parent: Parent
    tokens: tuple[int, ...]
    images: Images


class Node(NamedTuple):
    """A published block. Its number is never used again, so that a child's key names this very content."""

    number: int
    block: int


class Hit(NamedTuple):
    """Blocks with the first len(blocks) * block_size tokens of a prompt."""

    blocks: list[int]
    parents: list[Parent]  # of each block, and at the end what the next one would hang on


class PrefixCache:
    """Full blocks by what they hold. A block belongs to it from `publish` until the pool takes it for another use."""

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.asked_tokens = self.hit_tokens = 0
        self._pool, self._block_size = pool, block_size
        self._nodes: dict[Key, Node] = {}
        self._keys: dict[int, Key] = {}  # by block
        self._made = 0
        pool.on_evict = self._forget

    def match(self, tokens: Sequence[int], spans: Sequence[ImageSpan], root: Root) -> Hit:
        """The longest known beginning, with each of its blocks held once more for the caller.

        It leaves at least one token to compute, and never ends inside an image span.
        """
        size = self._block_size
        blocks: list[int] = []
        parents: list[Parent] = [root]
        for i in range((len(tokens) - 1) // size):
            node = self._nodes.get(self._key(parents[-1], i, tokens, spans))
            if node is None:
                break
            blocks.append(node.block)
            parents.append(node.number)
        for span in reversed(spans):
            if span.start < len(blocks) * size < span.start + span.length:
                del blocks[span.start // size :]
        for block in blocks:
            self._pool.hold(block)
        return Hit(blocks, parents[: len(blocks) + 1])

    def publish(
        self, parent: Parent, index: int, block: int, tokens: Sequence[int], spans: Sequence[ImageSpan]
    ) -> Node:
        """Make the full block number `index` of a sequence known; its holder goes on with the node's block.

        Where the same content is known already, that is the other one: the caller's is released, so that a block which
        is in use always has its parents in use.
        """
        key = self._key(parent, index, tokens, spans)
        node = self._nodes.get(key)
        if node is not None:
            self._pool.hold(node.block)
            self._pool.release([block])
            return node
        self._made += 1
        node = self._nodes[key] = Node(self._made, block)
        self._keys[block] = key
        self._pool.publish(block)
        return node

    def count(self, asked: int, hit: int) -> None:
        """Note an admitted prompt for the hit rate: its tokens, and those of them that were found."""
        self.asked_tokens += asked
        self.hit_tokens += hit

    @property
    def blocks(self) -> list[int]:
        return list(self._keys)

    def check_integrity(self) -> None:
        """Raises `RuntimeError` where a block has no parent or two names."""
        numbers = {node.number for node in self._nodes.values()}
        for key, node in self._nodes.items():
            if self._keys.get(node.block) != key:
                raise RuntimeError(f"block {node.block} is known by two keys")
            if not isinstance(key.parent, Root) and key.parent not in numbers:
                raise RuntimeError(f"block {node.block} is known, but its parent is not")
        if len(self._keys) != len(self._nodes):
            raise RuntimeError(f"{len(self._nodes)} nodes, but {len(self._keys)} blocks with a key")

    def _key(self, parent: Parent, index: int, tokens: Sequence[int], spans: Sequence[ImageSpan]) -> Key:
        start, end = index * self._block_size, (index + 1) * self._block_size
        images = tuple(
            (span.start - start, span.picture.digest)
            for span in spans
            if span.start < end and start < span.start + span.length
        )
        return Key(parent, tuple(tokens[start:end]), images)

    def _forget(self, block: int) -> None:
        del self._nodes[self._keys.pop(block)]
