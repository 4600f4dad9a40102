"""The picture of the architecture: drawn from the imports, and not out of date."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.draw_architecture import direct, draw, floors, import_graph

pytestmark = pytest.mark.unit
ROOT = Path(__file__).resolve().parents[2]


def test_the_committed_picture_is_what_the_imports_say() -> None:
    drawn = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    again = "run `python -m tools.draw_architecture docs/architecture.svg`"
    assert drawn == draw(import_graph()), f"docs/architecture.svg is out of date: {again}"


def test_a_box_stands_above_what_it_imports() -> None:
    graph = {"top": {"middle", "ground"}, "middle": {"ground"}, "ground": set[str]()}
    assert floors(graph) == {"ground": 0, "middle": 1, "top": 2}
    assert list(direct(graph)) == [("middle", "ground"), ("top", "middle")]


def test_a_cycle_is_an_error() -> None:
    with pytest.raises(ValueError, match="imports go round: one -> two -> one"):
        floors({"one": {"two"}, "two": {"one"}})
