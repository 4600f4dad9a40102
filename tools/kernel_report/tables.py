"""The report's output: a table for a terminal, the same table in Markdown, and the sum of a decode step."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tools.kernel_report.judge import Row
from tools.kernel_report.machines import MACHINES

HEAD = [
    "kernel",
    "target",
    "regs",
    "spill",
    "shared",
    "programs/SM",
    "128-bit",
    "memory us",
    "issue us",
    "pipe us",
    "ratio",
    "bar",
]
LAYERS = 32
DECODE_ROWS = (1, 16)  # batch sizes whose decode steps are added up
HEAD_BYTES = 151936 * 4096 * 2  # the output matrix, dense 16-bit: torch's own product
REACHED = (0.4, 0.6)  # of their bound is what the best published runtimes reach on these GPUs


def page(rows: Sequence[Row]) -> str:
    """The whole report as Markdown: all kernels, then the decode steps of each GPU."""
    parts = [markdown(HEAD, map(cells, rows))]
    for target in dict.fromkeys(row.target for row in rows):
        for batch in DECODE_ROWS:
            title = f"### A decode step of {batch} row{'s'[: batch > 1]}, {MACHINES[target].label}"
            parts += [title, decode_step(rows, target, batch)]
    return "\n\n".join(parts)


def cells(row: Row) -> list[str]:
    """The table cells of one kernel; three cells where it does not compile."""
    if row.error:
        return [row.kernel, row.target, f"FAILED: {row.error}"]
    return [
        row.kernel,
        row.target,
        str(row.registers),
        str(row.spilled),
        str(row.shared),
        f"{row.programs_per_sm} ({row.limit})",
        f"{row.wide:.0%}",
        f"{row.memory_us:.1f}",
        f"{row.issue_us:.1f}",
        f"{row.pipe_us:.1f} {row.pipe}",
        f"{row.ratio:.2f}",
        "" if row.max_ratio is None else f"{row.max_ratio}",
    ]


def text(rows: Iterable[Row]) -> str:
    """Aligned columns, then the instruction mix of each main loop."""
    rows = list(rows)
    lines = [HEAD, *map(cells, rows)]
    whole = [line for line in lines if len(line) == len(HEAD)]
    widths = [max(len(line[i]) for line in whole) for i in range(len(HEAD))]
    table = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=False)).rstrip() for line in lines]
    mixes = [
        f"  {row.kernel} {row.target}: " + "  ".join(f"{name} {count}" for name, count in row.mix.items())
        for row in rows
        if row.mix
    ]
    return "\n".join([*table, "", "main loop, instructions a warp and iteration:", *mixes])


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def decode_step(rows: Iterable[Row], target: str, batch: int) -> str:
    """The launches of one decoder layer for `batch` rows, and the least time of a whole step, as Markdown."""
    label = re.compile(rf", {batch} rows?\b")
    layer = [row for row in rows if row.target == target and row.per_layer and label.search(row.kernel)]
    lines = [
        [row.kernel, str(row.per_layer), _kb(row.bytes_moved), _kb(row.least_bytes), f"{row.bound_us:.1f}"]
        for row in layer
    ]
    launches = sum(row.per_layer for row in layer)
    moved, least = (
        sum(n * row.per_layer for row, n in counts)
        for counts in ([(row, row.bytes_moved) for row in layer], [(row, row.least_bytes) for row in layer])
    )
    bound = sum(row.bound_us * row.per_layer for row in layer)
    lines.append(["one layer", str(launches), _kb(moved), _kb(least), f"{bound:.1f}"])
    machine = MACHINES[target]
    head = HEAD_BYTES / machine.gpu.bandwidth * 1e6
    step = bound * LAYERS + head
    low, high = (batch * 1e6 / step * part for part in REACHED)
    table = markdown(["launch", "a layer", "KB moved", "of these weights, keys, values", "us at least"], lines)
    return (
        f"{table}\n\nBound on a decode step of {batch} row{'s'[: batch > 1]} on {machine.label}: {LAYERS} x {bound:.1f}"
        f" us + {head:.0f} us for the output matrix = {step / 1000:.2f} ms, {batch * 1e6 / step:.0f} tokens/s. At"
        f" {REACHED[0]:.0%} to {REACHED[1]:.0%} of it: {low:.0f} to {high:.0f} tokens/s. Computed from machine code,"
        " not measured."
    )


def _kb(count: int) -> str:
    return f"{count / 1000:.0f}"
