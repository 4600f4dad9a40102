"""The suite's parts on a pretended GPU: each ends with a row that counts what it would launch and compile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from benchmarks.gpu.dry_run.binding import Bound
from benchmarks.gpu.parts import Parts, Row

COMPILES = "compile"  # the part after which every kernel of the others should be in Triton's cache


def counted_parts(parts: Parts, bound: Bound) -> Parts:
    """The parts with their counts; one that launches a kernel that the part `compile` did not compile fails."""
    compiled: set[tuple[str, str]] = set()
    return {name: _counted(name, part, bound, compiled) for name, part in parts.items()}


def _counted(
    name: str, part: Callable[[], Iterable[Row]], bound: Bound, compiled: set[tuple[str, str]]
) -> Callable[[], Iterator[Row]]:
    def rows() -> Iterator[Row]:
        eager, replayed = bound.eager, bound.replayed
        bound.used.clear()
        yield from map(_without_judgment, part())
        late: list[str] = []
        if name == COMPILES:
            compiled.update(bound.used)
        elif compiled:
            late = sorted({bound.described(key) for key in bound.used - compiled})
        yield {
            "dry_run": name,
            "kernels": len(bound.used),
            "launched_by_the_host": bound.eager - eager,
            "launched_in_graphs": bound.replayed - replayed,
            "compiled_late": len(late),
            "which": late,
            **({"right": False} if late else {}),
        }

    return rows


def _without_judgment(row: Row) -> Row:
    """A row without what it says of numbers, of which there are none; a failure stays one."""
    return row if "failed" in row else {key: value for key, value in row.items() if key != "right"}
