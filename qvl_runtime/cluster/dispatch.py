"""Which rows go to which engine, and what happens to those of an engine that dies. Knows no Ray.

A row that was with an engine when it died may be why. It is asked again, alone in an engine that has nothing else, so
that the innocent ones are answered and the guilty one is known: a second death makes it an error.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from qvl_runtime.cluster.rows import Row

LIVES = 2  # deaths of an engine until the row that it had is an error


class Dispatch:
    """Rows to be answered, and those that each worker has."""

    def __init__(self, chunks: Iterator[list[Row]]) -> None:
        self._chunks = chunks
        self._next = next(chunks, None)
        self._suspects: deque[Row] = deque()
        self._deaths: dict[int, int] = {}  # by the row's index
        self._held: dict[str, dict[int, Row]] = {}  # by worker: rows by index
        self._alone: set[str] = set()  # workers that have, or should have, one suspect and nothing else

    @property
    def is_over(self) -> bool:
        """Whether no row is left, here or with a worker."""
        return self._next is None and not self._suspects and not any(self._held.values())

    def held(self, worker: str) -> int:
        """Rows that a worker has."""
        return len(self._held.get(worker, ()))

    def take(self, worker: str, room: int) -> list[Row]:
        """The next rows for a worker that may hold `room` in all; none if it has enough, or must wait.

        A worker takes suspects, one at a time, if it has nothing else and no other worker is at it, or if nothing else
        is left to do.
        """
        held = self.held(worker)
        if self._suspects and not held and (self._next is None or not self._alone - {worker}):
            self._alone.add(worker)
            return self._give(worker, [self._suspects.popleft()])
        if worker in self._alone:
            if held:
                return []
            self._alone.discard(worker)
        if self._next is None or held >= room:
            return []
        chunk, self._next = self._next, next(self._chunks, None)
        return self._give(worker, chunk)

    def answered(self, worker: str, indices: Sequence[int]) -> None:
        """Take rows off a worker."""
        rows = self._held.get(worker, {})
        for index in indices:
            rows.pop(index, None)
            self._deaths.pop(index, None)

    def lost(self, worker: str) -> list[Row]:
        """Take back the rows of a worker that died; returns those that have had their chances."""
        rows = list(self._held.pop(worker, {}).values())
        self._alone.discard(worker)
        hopeless: list[Row] = []
        for row in rows:
            deaths = self._deaths[row.position] = self._deaths.get(row.position, 0) + 1
            (hopeless if deaths >= LIVES else self._suspects).append(row)
        return hopeless

    def _give(self, worker: str, rows: list[Row]) -> list[Row]:
        self._held.setdefault(worker, {}).update((row.position, row) for row in rows)
        return rows
