"""Draw the folders of the package as floors, from its own imports.

`python -m tools.draw_architecture docs/architecture.svg` writes the committed picture.

Every folder of `qvl_runtime` and the package `qvl_kernels` is a box with the first line of its docstring. It stands one
floor above the highest folder that it imports. An arrow leads from a folder to one that it imports, where no longer way
leads there; imports under TYPE_CHECKING count.
"""

from __future__ import annotations

import argparse
import ast
import textwrap
from collections.abc import Iterator
from functools import cache
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"qvl_runtime": ROOT / "qvl_runtime", "qvl_kernels": ROOT / "kernels" / "qvl_kernels"}
WIDTH, BOX, HEIGHT, GAP, FLOOR = 980, 236, 78, 24, 126  # pixels
STYLE = """
  svg { font-family: system-ui, sans-serif; background: white }
  rect { fill: #f4f6fb; stroke: #5b6b95; rx: 6 }
  .name { font-weight: 600; font-size: 15px; fill: #1c2541 }
  .text { font-size: 11px; fill: #3a4668 }
  path { fill: none; stroke: #8a97bb; marker-end: url(#head) }
"""


def folder_of(module: str) -> str | None:
    """The box that a module belongs to; None for the package's front door and what is not ours."""
    top, *rest = module.split(".")
    if top == "qvl_kernels":
        return top
    return rest[0] if top == "qvl_runtime" and rest else None


def imported_modules(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_graph() -> dict[str, set[str]]:
    """The folders and modules at the top of both packages, each with those that it imports."""
    graph: dict[str, set[str]] = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            module = ".".join([package, *path.relative_to(folder).with_suffix("").parts])
            box = folder_of(module)
            if box is None or box == "__init__":
                continue
            targets = {folder_of(name) for name in imported_modules(path)} - {None, box}
            graph.setdefault(box, set()).update(name for name in targets if name is not None)
    return {box: {target for target in targets if target in graph} for box, targets in graph.items()}


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """The floor of each box: the length of its longest way down. Raises `ValueError` for a cycle."""

    @cache
    def floor(box: str, above: tuple[str, ...] = ()) -> int:
        if box in above:
            raise ValueError(f"imports go round: {' -> '.join([*above, box])}")
        return max((1 + floor(target, (*above, box)) for target in graph[box]), default=0)

    return {box: floor(box) for box in graph}


def direct(graph: dict[str, set[str]]) -> Iterator[tuple[str, str]]:
    """The arrows without those that a longer way makes redundant."""

    @cache
    def below(box: str) -> frozenset[str]:
        return frozenset(graph[box]).union(*(below(target) for target in graph[box]))

    for box, targets in sorted(graph.items()):
        for target in sorted(targets):
            if not any(target in below(other) for other in targets - {target}):
                yield box, target


def summary(box: str) -> str:
    """The first line of a folder's or a module's docstring, up to its first colon or full stop."""
    base = PACKAGES["qvl_kernels"] if box == "qvl_kernels" else PACKAGES["qvl_runtime"] / box
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    text = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
    return text.replace("`", "").split(". ")[0].rstrip(".")


def draw(graph: dict[str, set[str]]) -> str:
    """The picture as SVG."""
    level = floors(graph)
    highest = max(level.values())
    place: dict[str, tuple[float, float]] = {}
    for floor in range(highest + 1):
        row = sorted(box for box in graph if level[box] == floor)
        left = (WIDTH - len(row) * BOX - (len(row) - 1) * GAP) / 2
        for number, box in enumerate(row):
            place[box] = (left + number * (BOX + GAP), 16 + (highest - floor) * FLOOR)
    height = 32 + highest * FLOOR + HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        "<title>The folders of qvl_runtime, each above what it imports</title>",
        f"<style>{STYLE}</style>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" style="fill:#8a97bb;stroke:none;marker-end:none"/></marker></defs>',
    ]
    for box, target in direct(graph):
        (x, y), (tx, ty) = place[box], place[target]
        start, end = x + BOX / 2, tx + BOX / 2
        bend = (ty - y - HEIGHT) / 2
        parts.append(
            f'<path d="M{start:.0f},{y + HEIGHT:.0f} C{start:.0f},{y + HEIGHT + bend:.0f} '
            f'{end:.0f},{ty - bend:.0f} {end:.0f},{ty:.0f}"/>'
        )
    for box, (x, y) in sorted(place.items()):
        parts.append(f'<rect x="{x:.0f}" y="{y:.0f}" width="{BOX}" height="{HEIGHT}"/>')
        parts.append(f'<text class="name" x="{x + 10:.0f}" y="{y + 21:.0f}">{escape(box)}</text>')
        for number, line in enumerate(textwrap.wrap(summary(box), 36, max_lines=3, placeholder=" …")):
            parts.append(f'<text class="text" x="{x + 10:.0f}" y="{y + 38 + 14 * number:.0f}">{escape(line)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    """Write the SVG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("svg", type=Path, help="the file to write")
    path = parser.parse_args().svg
    path.write_text(draw(import_graph()), encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
