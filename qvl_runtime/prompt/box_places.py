"""Positions within a box or quad, made once and shared by all answers: what may come next, and where it leads.

A position knows the coordinate that is being written, its digits so far and the interval that it must lie in, and not
the coordinates before it. So the same few thousand positions are met again and again, whatever the boxes are.
"""

from __future__ import annotations

from typing import NamedTuple

from qvl_runtime.prompt.box_spelling import BoxSpelling, Ids, Shape, interval, next_digits

KEPT = 1 << 16  # positions of coordinates, about 20 MB; then they are made again


class Place:
    """A position within a shape. `ids` may come next, and nothing else; compared by identity."""

    __slots__ = ("digits", "following", "high", "ids", "low", "number", "pending", "shape", "value")

    def __init__(
        self, shape: Shape, number: int, ids: Ids, pending: Ids = (), low: int = 0, high: int = 0, value: int = 0,
        digits: int = 0,
    ) -> None:  # fmt: skip
        """number: of the coordinate that is written or comes next; pending: fixed ids before it."""
        self.shape, self.number, self.ids, self.pending = shape, number, ids, pending
        self.low, self.high, self.value, self.digits = low, high, value, digits
        self.following: dict[int, Place] = {}  # by token, of those that lead to the same place whatever came before


class Within(NamedTuple):
    """Where an answer stands in a shape: the place, and the coordinates that are complete."""

    place: Place
    values: Ids = ()


class Places:
    """The positions of a tokenizer's spelling."""

    def __init__(self, spelling: BoxSpelling) -> None:
        self._spelling = spelling
        self._pending: dict[tuple[int, int, Ids], Place] = {}
        self._numbers: dict[tuple[int, int, int, int], Place] = {}

    def begin(self, shape: Shape) -> Within:
        """After the start tag of a shape."""
        return Within(self._before(shape, 0, shape.pieces[0]))

    def after(self, within: Within, token: int) -> Within | None:
        """After one of the tokens that may come next; None: the shape is closed."""
        place, values = within
        if (known := place.following.get(token)) is not None:
            return Within(known, values)
        shape = place.shape
        if place.pending:
            rest, number = place.pending[1:], place.number
        elif (digit := self._spelling.digit_of.get(token)) is not None:
            value = 10 * place.value + digit
            longer = self._written(shape, place.number, place.low, place.high, value, place.digits + 1)
            place.following[token] = longer
            return Within(longer, values)
        else:
            values, number = (*values, place.value), place.number + 1
            rest = shape.pieces[number][1:]
        if rest:
            place.following[token] = before = self._before(shape, number, rest)
            return Within(before, values)
        count = len(shape.pieces) - 1
        if number == count:
            return None
        return Within(self._number(shape, number, *interval(number, values, count)), values)

    def _before(self, shape: Shape, number: int, pending: Ids) -> Place:
        key = shape.start, number, pending
        if (found := self._pending.get(key)) is None:
            found = self._pending[key] = Place(shape, number, pending[:1], pending)
        return found

    def _number(self, shape: Shape, number: int, low: int, high: int) -> Place:
        """Before the first digit of a coordinate."""
        key = shape.start, number, low, high
        if (found := self._numbers.get(key)) is None:
            if len(self._numbers) * 16 >= KEPT:
                self._numbers.clear()
            found = self._numbers[key] = self._written(shape, number, low, high, 0, 0)
        return found

    def _written(self, shape: Shape, number: int, low: int, high: int, value: int, digits: int) -> Place:
        following, may_end = next_digits(value, digits > 0, low, high)
        ids = tuple([self._spelling.digits[digit] for digit in following])
        if may_end:
            ids = (*ids, shape.pieces[number + 1][0])
        return Place(shape, number, ids, (), low, high, value, digits)
