"""What the GPU path is to reach on an H100, against what the other parts measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

Row = dict[str, Any]
Rows = Mapping[str, list[Row]]  # by part


class Target(NamedTuple):
    """A figure and its bound; `rows` selects the row of a part by some of its fields."""

    part: str
    rows: Row
    field: str
    bound: float
    least: bool = False  # whether the bound is the least, and not the most


class Ratio(NamedTuple):
    """One figure over another of the same field, and its bound."""

    what: str
    over: tuple[str, Row]
    under: tuple[str, Row]
    field: str
    most: float


def _linears(rows: int, most: float) -> Target:
    found = {"contender": "int4, float16", "linear": "all of a layer in a row", "rows": rows}
    return Target("linears", found, "us", most)


def _speed(kind: str, tokens: int, least: float) -> Target:
    return Target(kind, {"what": "speed", "tokens": tokens}, "tok_s", least, True)


def _first(kind: str, prompt: str, most: float) -> Target:
    return Target(kind, {"what": "first token", "prompt": prompt}, "ms", most)


def _memory(kind: str, tokens: int, most: float) -> Target:
    return Target(kind, {"what": "memory", "tokens": tokens}, "gib", most)


NEW, AGAIN = "a new picture and 32 tokens", "the same picture and other 32 tokens"
TARGETS = (
    *(_linears(rows, most) for rows, most in ((1, 42), (4, 46), (16, 56), (64, 100))),
    *(
        Target("small", {"kernel": "all of a layer in a row", "rows": rows, "dependent": True}, "us", 6)
        for rows in (1, 16)
    ),
    _speed("int4", 2048, 400),
    _speed("int4", 8192, 300),
    _speed("int4-options", 2048, 480),
    _speed("int4-options", 8192, 400),
    _speed("bf16", 2048, 175),
    *(
        Target("int4", {"what": "throughput", "requests": requests}, "tok_s", least, True)
        for requests, least in ((16, 4800), (64, 9500))
    ),
    *(Target(kind, {"what": "step"}, "wall_over_gpu", 1.03) for kind in ("int4", "bf16")),
    *(
        _first(kind, prompt, most)
        for kind in ("int4", "bf16")
        for prompt, most in (
            *((f"{n} tokens", 8) for n in (32, 128, 300, 512)),
            ("2048 tokens", 55),
            (NEW, 20),
            (AGAIN, 8),
        )
    ),
    *(_memory("int4", *pair) for pair in ((2048, 10.3), (8192, 13.3))),
    *(_memory("int4-options", *pair) for pair in ((2048, 7.3), (8192, 8.8))),
    *(_memory("bf16", *pair) for pair in ((2048, 19.4), (8192, 22.4))),
)
RATIOS = tuple(
    Ratio(f"Int4 over BF16, {at['prompt']}", ("int4", at), ("bf16", at), "ms", 1.15)
    for at in ({"what": "first token", "prompt": f"{n} tokens"} for n in (1024, 2048))
)


def targets(rows: Rows) -> Iterator[Row]:
    """A row for each figure that was measured, and whether it meets its bound; the last counts those that do."""
    judged = [row for target in TARGETS for row in _judged(target, rows)]
    judged += [row for ratio in RATIOS for row in _ratio(ratio, rows)]
    yield from judged
    yield {"figures": len(judged), "met": sum(row["met"] for row in judged)}


def _judged(target: Target, rows: Rows) -> Iterator[Row]:
    for row in _found(rows, target.part, target.rows):
        value = row.get(target.field)
        if value is not None:
            met = value >= target.bound if target.least else value <= target.bound
            what = ", ".join(f"{row[key]}" for key in ("context", "requests") if key in row and key not in target.rows)
            name = ", ".join(filter(None, (*(f"{key} {found}" for key, found in target.rows.items()), what)))
            bound = f"{'>=' if target.least else '<='} {target.bound}"
            yield {"of": target.part, "figure": f"{target.field}: {name}", "is": value, "wanted": bound, "met": met}


def _ratio(ratio: Ratio, rows: Rows) -> Iterator[Row]:
    over, under = (_found(rows, *side) for side in (ratio.over, ratio.under))
    if over and under and under[0][ratio.field]:
        value = over[0][ratio.field] / under[0][ratio.field]
        met = value <= ratio.most
        yield {"of": ratio.over[0], "figure": ratio.what, "is": value, "wanted": f"<= {ratio.most}", "met": met}


def _found(rows: Rows, part: str, wanted: Row) -> list[Row]:
    return [row for row in rows.get(part, ()) if all(row.get(key) == value for key, value in wanted.items())]
