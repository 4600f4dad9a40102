"""Prefix caching: find cached blocks of a prompt by exact comparison of everything that they depend on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, zip_longest
from typing import NamedTuple, TypeAlias

from qvl_kernels.util import cdiv
from qvl_runtime.prompt.chatml import ImageSpan
from qvl_runtime.schedule.block_pool import BlockPool

SIBLINGS = 64  # continuations of one block that are compared, the latest first, in at most 0.1 ms


class Root(NamedTuple):
    """What every block of a sequence depends on: the NTK alpha of its rotated keys, its tenant's salt, its adapter."""

    alpha: float
    salt: str
    adapter: str | None = None


Parent: TypeAlias = "int | Root"
Images: TypeAlias = tuple[tuple[int, bytes], ...]  # first row counted from the block's own, and digest


class Key(NamedTuple):
    """Identifies the content of a block; two blocks are the same only if the whole keys are equal."""

    parent: Parent
    tokens: tuple[int, ...]
    images: Images


class Node(NamedTuple):
    """A published block. Its number is never reused, so a child's key identifies this content and no other."""

    number: int
    block: int


class Hit(NamedTuple):
    """The first `length` tokens of a prompt, in blocks of which the last may be used in part."""

    length: int
    blocks: list[int]
    parents: list[Parent]  # of each block that is used in full, and the parent of the next one


class PrefixCache:
    """Finds published blocks by their content. A block belongs to the cache from `publish` until the pool evicts it.

    A shared prompt rarely ends at the end of a block, so a hit may end inside one: the sequence that uses it copies the
    block before it writes.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.queried_tokens = self.hit_tokens = 0
        self._pool, self._block_size = pool, block_size
        self._children: dict[Parent, dict[Key, Node]] = {}
        self._keys: dict[int, Key] = {}  # by block
        self._made = 0
        pool.on_evict = self._forget

    def match(self, tokens: Sequence[int], spans: Sequence[ImageSpan], root: Root) -> Hit:
        """Find the longest cached prefix of a prompt, and add a reference to each of its blocks for the caller.

        The hit leaves at least one token to compute, and never ends inside an image span.
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
        partial, common = self._longest_match(self._key(parents[-1], len(blocks), tokens, spans))
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
        """Publish block number `index` of a sequence, which `tokens` may fill in part, and return its node.

        The block is immutable from here on. If its content is already published, the caller's block is released and the
        node names the published one, so that a referenced block always has referenced parents. The sequence must
        continue with the node's block.
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

    def count(self, queried: int, hit: int) -> None:
        """Count an admitted prompt of `queried` tokens, of which `hit` were cached, for the hit rate."""
        self.queried_tokens += queried
        self.hit_tokens += hit

    @property
    def blocks(self) -> list[int]:
        """The numbers of all published blocks."""
        return list(self._keys)

    def check_integrity(self) -> None:
        """Raise `RuntimeError` if a block has two keys or an unpublished parent."""
        nodes = {key: node for siblings in self._children.values() for key, node in siblings.items()}
        numbers = {node.number for node in nodes.values()}
        for key, node in nodes.items():
            if self._keys.get(node.block) != key:
                raise RuntimeError(f"block {node.block} is published under two keys")
            if not isinstance(key.parent, Root) and key.parent not in numbers:
                raise RuntimeError(f"block {node.block} is published, but its parent is not")
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

    def _longest_match(self, target: Key) -> tuple[Node | None, int]:
        """Return the block with the same parent that shares most tokens with `target`, and how many it shares."""
        best, most = None, 0
        siblings = self._children.get(target.parent, {})
        for key, node in islice(reversed(siblings.items()), SIBLINGS):
            common = common_tokens(key, target)
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
    """Return how many leading tokens two blocks of one parent share, their images included."""
    common = next((i for i, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=False)) if a != b), None)
    common = min(len(one.tokens), len(other.tokens)) if common is None else common
    for mine, theirs in zip_longest(one.images, other.images):
        if mine != theirs:
            common = min(common, *(max(0, image[0]) for image in (mine, theirs) if image is not None))
    return common
