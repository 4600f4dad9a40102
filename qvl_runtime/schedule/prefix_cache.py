"""Prefix caching: find the blocks that hold the beginning of a prompt, by exact comparison of all they depend on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, zip_longest
from typing import NamedTuple, TypeAlias

from qvl_kernels.util import cdiv
from qvl_runtime.prompt.chatml import ImageSpan
from qvl_runtime.schedule.block_pool import BlockPool

SIBLINGS = 64  # continuations of one block that are compared, the latest first: a search takes 0.1 ms at most


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
    """The first `length` tokens of a prompt, in blocks of which the last may be used in part."""

    length: int
    blocks: list[int]
    parents: list[Parent]  # of each block that is used in full, and the parent of the next one


class PrefixCache:
    """Blocks by what they hold. A block belongs to it from `publish` until the pool takes it for another use.

    A question about an image rarely ends where a block does, so a hit may end inside one: its reader copies the block
    before it writes.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.asked_tokens = self.hit_tokens = 0
        self._pool, self._block_size = pool, block_size
        self._children: dict[Parent, dict[Key, Node]] = {}
        self._keys: dict[int, Key] = {}  # by block
        self._made = 0
        pool.on_evict = self._forget

    def match(self, tokens: Sequence[int], spans: Sequence[ImageSpan], root: Root) -> Hit:
        """The longest known beginning, with each of its blocks held once more for the caller.

        It leaves at least one token to compute, and never ends inside an image span.
        """
        size, most = self._block_size, len(tokens) - 1
        blocks: list[int] = []
        parents: list[Parent] = [root]
        while (len(blocks) + 1) * size <= most:
            key = self._key(parents[-1], len(blocks), tokens, spans)
            node = self._children.get(key.parent, {}).get(key)
            if node is None:
                break
            blocks.append(node.block)
            parents.append(node.number)
        length = len(blocks) * size
        partial, common = self._longest(self._key(parents[-1], len(blocks), tokens, spans))
        if partial is not None:
            blocks.append(partial.block)
            length = min(length + common, most)
        for span in reversed(spans):
            if span.start < length < span.start + span.length:
                length = span.start
        del blocks[cdiv(length, size) :]
        for block in blocks:
            self._pool.acquire(block)
        return Hit(length, blocks, parents[: length // size + 1])

    def publish(
        self, parent: Parent, index: int, block: int, tokens: Sequence[int], spans: Sequence[ImageSpan]
    ) -> Node:
        """Make block number `index` of a sequence known, the last of `tokens` perhaps in it and not at its end.

        The block is immutable from here on, and its sequence must continue with the node's block.

        Where the same content is known already, that is the other one: the caller's is released, so that a block which
        is in use always has its parents in use.
        """
        key = self._key(parent, index, tokens, spans)
        siblings = self._children.setdefault(parent, {})
        node = siblings.get(key)
        if node is not None:
            self._pool.acquire(node.block)
            self._pool.release([block])
            return node
        self._made += 1
        node = siblings[key] = Node(self._made, block)
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
        nodes = {key: node for siblings in self._children.values() for key, node in siblings.items()}
        numbers = {node.number for node in nodes.values()}
        for key, node in nodes.items():
            if self._keys.get(node.block) != key:
                raise RuntimeError(f"block {node.block} is known by two keys")
            if not isinstance(key.parent, Root) and key.parent not in numbers:
                raise RuntimeError(f"block {node.block} is known, but its parent is not")
        if len(self._keys) != len(nodes) or not all(self._children.values()):
            raise RuntimeError(f"{len(nodes)} nodes, but {len(self._keys)} blocks with a key")

    def _key(self, parent: Parent, index: int, tokens: Sequence[int], spans: Sequence[ImageSpan]) -> Key:
        start, end = index * self._block_size, (index + 1) * self._block_size
        images = tuple(
            (span.start - start, span.image.digest)
            for span in spans
            if span.start < end and start < span.start + span.length
        )
        return Key(parent, tuple(tokens[start:end]), images)

    def _longest(self, wanted: Key) -> tuple[Node | None, int]:
        """Of the blocks after the same parent the one that begins most like `wanted`, and how many tokens agree."""
        best, most = None, 0
        siblings = self._children.get(wanted.parent, {})
        for key, node in islice(reversed(siblings.items()), SIBLINGS):
            common = common_tokens(key, wanted)
            if common > most:
                best, most = node, common
        return best, most

    def _forget(self, block: int) -> None:
        key = self._keys.pop(block)
        siblings = self._children[key.parent]
        del siblings[key]
        if not siblings:
            del self._children[key.parent]


def common_tokens(one: Key, other: Key) -> int:
    """How many tokens two blocks of one parent have in common from the start, in their images too."""
    common = next((i for i, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=False)) if a != b), None)
    common = min(len(one.tokens), len(other.tokens)) if common is None else common
    for mine, theirs in zip_longest(one.images, other.images):
        if mine != theirs:
            common = min(common, *(max(0, image[0]) for image in (mine, theirs) if image is not None))
    return common
