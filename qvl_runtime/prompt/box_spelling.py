"""How a tokenizer spells boxes: the ids of digits and of the fixed pieces between them, looked up and not assumed.

A model was trained on one spelling of a box. Whether "),(" is one token of it or two is a matter of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, TypeVar

from qvl_runtime.errors import CheckpointError
from qvl_runtime.prompt.boxes import SCALE
from qvl_runtime.prompt.token_mask import Mask
from qvl_runtime.prompt.tokenizer import GROUNDING_TAGS, Tokenizer

FIELDS = {"box": 4, "quad": 8}  # coordinates of each shape
Ids = tuple[int, ...]
T = TypeVar("T")


class Shape(NamedTuple):
    """The spelling of a box or a quad: `pieces[i]` precedes coordinate i, and the last one ends the shape."""

    start: int  # <box> or <quad>
    pieces: tuple[Ids, ...]  # "(" "," "),(" "," ")</box>"
    longest: int  # the most tokens that it has: each coordinate with all its digits


class BoxSpelling:
    """The ids that boxes are made of, and which tokens of a text would spell a tag in plain letters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises `CheckpointError` for a vocabulary without a token for each digit."""
        encoded = [tokenizer.encode(str(digit), "none") for digit in range(10)]
        if any(len(ids) != 1 for ids in encoded):
            raise CheckpointError("the vocabulary has no token for each digit, so that boxes cannot be spelled with it")
        self.tokenizer = tokenizer
        self.digits: Ids = tuple(ids[0] for ids in encoded)
        self.digit_of = {token: digit for digit, token in enumerate(self.digits)}
        self.box, self.quad = self._shape("box"), self._shape("quad")
        self.shapes = {shape.start: shape for shape in (self.box, self.quad)}
        self.ends = frozenset((tokenizer.box_end, tokenizer.quad_end))
        self.tags = frozenset(tokenizer.special_tokens[tag] for tag in GROUNDING_TAGS)
        self._tails = {tag[:end] for tag in _TAGS for end in range(1, len(tag))}
        self._forbidden: dict[bytes, Ids] = {}
        self.masks: dict[Ids, Mask] = {}  # of the few sets of tokens that may come next within boxes
        self._shared: dict[Hashable, Any] = {}

    def shared(self, key: Hashable, make: Callable[[], T]) -> T:
        """What answers have in common under a key, made by the first; the latest 64 are kept."""
        if (found := self._shared.pop(key, None)) is None:
            found = make()
        self._shared[key] = found  # the latest is the last
        while len(self._shared) > 64:
            self._shared.pop(next(iter(self._shared)), None)
        shared: T = found
        return shared

    @cached_property
    def _closers(self) -> list[tuple[int, bytes]]:
        """The tokens that hold a ">", looked up once, in 0.1 s for the published vocabulary."""
        ranks = ((token, self.tokenizer.token_bytes(token)) for token in range(self.tokenizer.n_ranks))
        return [(token, spelled) for token, spelled in ranks if b">" in spelled]

    @cached_property
    def alphabet(self) -> Ids:
        """The tokens whose probabilities tell about a box: digits, start tags, and the first ids of the pieces."""
        firsts = [piece[0] for shape in self.shapes.values() for piece in shape.pieces]
        return tuple(dict.fromkeys((*self.digits, *self.shapes, *firsts)))

    def tail(self, before: bytes, token: int) -> bytes:
        """The end of a text that may become a tag in plain letters, after one more token; `before` is its last one."""
        if token >= self.tokenizer.n_ranks:
            return b"" if token < self.tokenizer.n_vocab else before  # a padding row of the model adds no text
        text = before + self.tokenizer.token_bytes(token)
        start = text.rfind(b"<")
        return text[start:] if start >= 0 and text[start:] in self._tails else b""

    def completes_tag(self, tail: bytes) -> Ids:
        """The tokens after which a text that ends like this would hold a tag in plain letters, as in `<` `box` `>`.

        The parser reads text, so such a tag would open a box that the grammar does not know of.
        """
        if tail not in self._forbidden:
            self._forbidden[tail] = tuple(
                token for token, spelled in self._closers if any(tag in tail + spelled for tag in _TAGS)
            )
        return self._forbidden[tail]

    def _shape(self, name: str) -> Shape:
        points = ",".join(f"({n},{n})" for n in range(FIELDS[name] // 2))
        start, *ids = self.tokenizer.encode(f"<{name}>{points}</{name}>", "grounding")
        pieces = tuple(_split(ids, self.digit_of))
        return Shape(start, pieces, 1 + sum(map(len, pieces)) + FIELDS[name] * len(str(SCALE)))


@lru_cache(maxsize=1 << 16)
def next_digits(value: int, begun: bool, low: int, high: int) -> tuple[tuple[int, ...], bool]:
    """The digits that may follow those of `value`, if any are written, and whether the number may end here.

    A digit may follow if some number that begins so lies between `low` and `high`; there are no leading zeros.
    """
    may = (digit for digit in range(10) if (value or not begun) and _can_become(10 * value + digit, low, high))
    return tuple(may), begun and low <= value <= high


def interval(number: int, values: Sequence[int], count: int) -> tuple[int, int]:
    """The least and the largest value of coordinate `number`, after `values`; count: of the shape, 4 or 8."""
    if count != FIELDS["box"]:
        return 0, SCALE
    return (0, SCALE - 1) if number < 2 else (values[number - 2] + 1, SCALE)


def _can_become(value: int, low: int, high: int) -> bool:
    """Whether a number that begins with the digits of `value`, or is it, lies in an interval."""
    first, last = value, value
    while first <= high:
        if last >= low:
            return True
        if value == 0:
            return False  # no leading zeros
        first, last = 10 * first, 10 * last + 9
    return False


_TAGS = tuple(tag.encode() for tag in GROUNDING_TAGS)


def _split(ids: Iterable[int], digits: Iterable[int]) -> list[Ids]:
    """The pieces between digits."""
    pieces: list[list[int]] = [[]]
    for token in ids:
        if token in digits:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return [tuple(piece) for piece in pieces]
