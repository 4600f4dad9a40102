"""The KV cache under random use: after every operation the books agree, and a hit holds what it should."""

from __future__ import annotations

from collections.abc import Sequence as Items

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from PIL import Image

from qvl_runtime.errors import CapacityError
from qvl_runtime.model.cache_layout import BLOCK_SIZE
from qvl_runtime.prompt.chatml import ImageSpan
from qvl_runtime.prompt.images import LoadedImage, load_image
from qvl_runtime.schedule.kv_cache import KVCache
from qvl_runtime.schedule.sequence import Sequence
from tests.schedule.small import small_config

pytestmark = pytest.mark.unit
BLOCKS = 12
PICTURES = [load_image(Image.new("RGB", (8, 8), color), 8) for color in ("red", "green")]


class Cached:
    """A sequence, the tokens that it should hold, and the numbers written into the cache for them."""

    def __init__(self, sequence: Sequence, tokens: list[int], spans: tuple[ImageSpan, ...]) -> None:
        self.sequence, self.tokens, self.spans = sequence, tokens, spans
        self.written: list[float] = []


class CacheMachine(RuleBasedStateMachine):
    """Each row written carries a mark of all that it depends on; a shared row must carry the mark of its reader."""

    sequences: Bundle[Cached] = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache(small_config(), BLOCKS * BLOCK_SIZE, torch.float32, torch.device("cpu"))
        self.live: list[Cached] = []

    def mark(self, cached: Cached, position: int) -> float:
        images = tuple(s.image.digest for s in cached.spans if s.start <= position)
        root = cached.sequence.root
        return float(hash((tuple(cached.tokens[: position + 1]), images, root)) % 1_000_003)

    def write(self, cached: Cached, count: int) -> None:
        sequence = cached.sequence
        count = min(count, len(cached.tokens) - sequence.length)
        if sequence.needed(count) > self.cache.pool.available:
            with pytest.raises(CapacityError):
                sequence.append(count)
            return
        sequence.append(count)
        for position in range(sequence.length - count, sequence.length):
            slot = sequence.blocks[position // BLOCK_SIZE], position % BLOCK_SIZE
            self.cache.layers[0].k[slot[0], 0, slot[1], 0] = self.mark(cached, position)

    @rule(
        target=sequences,
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=70),
        span=st.none() | st.tuples(st.integers(0, 30), st.sampled_from(PICTURES)),
        alpha=st.sampled_from([1.0, 3.0]),
        salt=st.sampled_from(["", "tenant"]),
    )
    def allocate(self, tokens: list[int], span: tuple[int, LoadedImage] | None, alpha: float, salt: str) -> Cached:
        spans: tuple[ImageSpan, ...] = ()
        if span is not None:
            start = span[0]
            tokens = tokens[:start] + [0] * (start - len(tokens)) + [9] * 20 + tokens[start:] + [1]
            spans = (ImageSpan(start, 20, span[1]),)
        cached = Cached(self.cache.sequence(alpha, salt), tokens, spans)
        found = cached.sequence.find_prefix(tokens, spans)
        assert found < len(tokens)
        assert all(not s.start < found < s.start + s.length for s in spans)
        self.live.append(cached)
        return cached

    @rule(cached=sequences, count=st.integers(1, 40), publish=st.booleans(), tail=st.booleans())
    def append(self, cached: Cached, count: int, publish: bool, tail: bool) -> None:
        self.write(cached, count)
        if publish:
            cached.sequence.publish(cached.tokens, cached.spans, tail)

    @rule(cached=sequences, token=st.integers(0, 1))
    def decode(self, cached: Cached, token: int) -> None:
        if cached.sequence.length == len(cached.tokens):
            cached.tokens.append(token)
            self.write(cached, 1)

    @rule(target=sequences, cached=sequences)
    def fork(self, cached: Cached) -> Cached:
        tokens = [*cached.tokens[: cached.sequence.length], 0]
        spans = tuple(s for s in cached.spans if s.start + s.length < len(tokens))
        if spans != cached.spans:
            tokens, spans = list(cached.tokens), cached.spans
        twin = Cached(cached.sequence.fork(), tokens, spans)
        self.live.append(twin)
        return twin

    @rule(cached=sequences, length=st.integers(0, 90))
    def truncate(self, cached: Cached, length: int) -> None:
        cached.sequence.truncate(length)

    @rule(cached=consumes(sequences))
    def free(self, cached: Cached) -> None:
        """Also what cancelling and preempting do to the cache."""
        cached.sequence.close()
        self.live.remove(cached)

    @rule()
    def evict(self) -> None:
        """Someone takes all there is, and gives it back: nothing can be found any more but what is held."""
        with self.cache.sequence(99.0) as glutton:
            glutton.append(self.cache.free_tokens)
            assert self.cache.pool.available == 0

    @invariant()
    def books_agree(self) -> None:
        self.cache.check_integrity()

    @invariant()
    def rows_are_the_readers_own(self) -> None:
        for cached in self.live:
            sequence = cached.sequence
            at = range(sequence.length)
            got = [float(self.cache.layers[0].k[sequence.blocks[i // BLOCK_SIZE], 0, i % BLOCK_SIZE, 0]) for i in at]
            assert got == [self.mark(cached, i) for i in at]

    def teardown(self) -> None:
        for cached in self.live:
            cached.sequence.close()
        self.cache.check_integrity()
        assert self.cache.pool.available == BLOCKS


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestCache = CacheMachine.TestCase


def spans_of(*starts: int, images: Items[LoadedImage]) -> tuple[ImageSpan, ...]:
    return tuple(ImageSpan(start, 20, image) for start, image in zip(starts, images, strict=True))


def known(tokens: Items[int], spans: tuple[ImageSpan, ...] = (), size: int = 40) -> KVCache:
    """A cache in which this prompt has been computed."""
    cache = KVCache(small_config(), size * BLOCK_SIZE, torch.float32, torch.device("cpu"))
    with cache.sequence(1.0) as first:
        first.append(len(tokens))
        first.publish(tokens, spans)
    return cache


def found(
    cache: KVCache, tokens: Items[int], spans: tuple[ImageSpan, ...] = (), alpha: float = 1.0, salt: str = ""
) -> int:
    with cache.sequence(alpha, salt) as second:
        return second.find_prefix(tokens, spans)


@pytest.mark.parametrize(("length", "hit"), [(1, 0), (15, 14), (16, 15), (17, 16), (32, 31), (33, 32), (48, 47)])
def test_a_hit_leaves_a_token_to_compute(length: int, hit: int) -> None:
    assert found(known(range(48)), range(length)) == hit


def test_a_hit_needs_equal_tokens_alpha_salt_and_images() -> None:
    red, green = PICTURES
    tokens, spans = list(range(64)), spans_of(4, images=[red])
    cache = known(tokens, spans)
    assert found(cache, tokens, spans) == 63
    assert found(cache, tokens, spans, alpha=3.0) == 0
    assert found(cache, tokens, spans, salt="other") == 0
    assert found(cache, tokens, spans_of(4, images=[green])) == 4, "the same text with another image"
    assert found(cache, [99, *tokens[1:]], spans) == 0, "later blocks equal, the first not"
    assert found(cache, tokens[:40] + [99] * 24, spans) == 40


@pytest.mark.parametrize("start", range(0, 40))
def test_a_hit_never_ends_inside_an_image(start: int) -> None:
    """Wherever it starts: the text after it differs at once, or the image itself was cut off from the cache."""
    spans = spans_of(start, images=PICTURES[:1])
    tokens = list(range(100))
    cache = known(tokens, spans)
    for length in range(1, 90):
        hit = found(cache, tokens[:length] + [999] * 10, spans)
        assert not start < hit < start + 20


def test_kept_blocks_go_least_recently_used_first_and_children_before_parents() -> None:
    cache = known(range(64), size=8)
    with cache.sequence(1.0) as other:
        other.append(64)
        other.publish(range(100, 164), ())
    assert found(cache, [*range(64), 0]) == 64  # used again, so it is the younger
    with cache.sequence(1.0) as third:
        third.append(3 * BLOCK_SIZE)
        cache.check_integrity()
    assert found(cache, [*range(64), 0]) == 64
    assert found(cache, [*range(100, 164), 0]) == 16, "its last three blocks are gone"
    assert cache.pool.evictions == 3


def test_the_same_prompt_computed_twice_at_once_is_kept_once() -> None:
    cache = known(range(5))
    one, two = cache.sequence(1.0), cache.sequence(1.0)
    for sequence in (one, two):
        sequence.append(40)
        sequence.publish(range(40), ())
    assert one.blocks[:2] == two.blocks[:2] and one.blocks[2] != two.blocks[2]
    cache.check_integrity()
    one.close()
    two.close()
    assert cache.pool.available == 40


def test_a_cache_that_is_too_small_says_so_with_numbers() -> None:
    cache = KVCache(small_config(), 64, torch.float32, torch.device("cpu"))
    with pytest.raises(CapacityError, match=r"needs 65 tokens of KV cache, 0 MiB; the cache holds 64: .*int8"):
        cache.check_fits_cache(65)
