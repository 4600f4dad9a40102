"""Do two reports of a machine agree? `python -m benchmarks.report.agree ONE TWO`, two folders or report.json files.

Two figures agree where the spreads that the reports state meet; what was measured once states none. Writes a Markdown
table of those that do not, and how many do.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Compared(NamedTuple):
    """A figure of both reports."""

    name: str
    one: dict[str, float]  # median, p10, p90
    other: dict[str, float]

    @property
    def ratio(self) -> float:
        """The second over the first."""
        return self.other["median"] / self.one["median"]

    @property
    def meet(self) -> bool:
        """Whether the intervals from p10 to p90 overlap."""
        return self.one["p10"] <= self.other["p90"] and self.other["p10"] <= self.one["p90"]


def spreads(report: dict[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """Every figure that states its spread, by name."""
    for model in report["models"]:
        if "skipped" in model:
            continue
        label, speed = model["label"], model["speed"]
        for name in ("read_gb_s", "gemm_gop_s"):
            yield f"{label}: ceiling, {name}", speed["ceilings"][name]
        for mean in speed["means"]:
            yield f"{label}: mean over {mean['length']} tokens", mean["tok_s"]
        for batch in speed["batches"]:
            yield f"{label}: {batch['size']} together", batch["tok_s"]
        for curve in model["growth"]:
            for point in curve["points"]:
                yield f"{label}: {curve['name']} at {point['x']}", point["seconds"]


def compare(one: dict[str, Any], other: dict[str, Any]) -> list[Compared]:
    """The figures that both have, with a spread."""
    others = dict(spreads(other))
    both = (Compared(name, value, others[name]) for name, value in spreads(one) if name in others)
    return [row for row in both if min(row.one["samples"], row.other["samples"]) > 1]


def load(path: Path) -> dict[str, Any]:
    """Read a report from its folder or its report.json."""
    file = path / "report.json" if path.is_dir() else path
    return dict(json.loads(file.read_text()))


def main() -> None:
    """Print how many figures of two reports agree and a table of those that do not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("one", type=Path)
    parser.add_argument("two", type=Path)
    args = parser.parse_args()
    rows = compare(load(args.one), load(args.two))
    apart = [row for row in rows if not row.meet]
    print(f"{len(rows) - len(apart)} of {len(rows)} figures agree: the spreads that the reports state meet")
    if apart:
        print("\n| figure | first | second | ratio |\n|---|---|---|---|")
    for row in apart:
        first, second = (f"{v['median']:.3g} ({v['p10']:.3g}-{v['p90']:.3g})" for v in (row.one, row.other))
        print(f"| {row.name} | {first} | {second} | {row.ratio:.2f} |")


if __name__ == "__main__":
    main()
