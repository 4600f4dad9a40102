"""Tables on a terminal of any width, and piped, cut no word and no number."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from qvl_runtime.cli.plan import peak_table, plan_report, show_plan
from qvl_runtime.cli.profile import show_table
from qvl_runtime.cli.terminal import print_table
from qvl_runtime.engine.engine import NANO
from qvl_runtime.plan.options import PlanOptions

pytestmark = pytest.mark.cpu
OPTIONS = PlanOptions("auto", "keep", "keep", "auto", False)


def printed(table: Table, width: int) -> list[str]:
    console = Console(width=width, record=True, force_terminal=False, file=io.StringIO())
    print_table(table, console)
    return console.export_text().splitlines()


def words_of(table: Table) -> set[str]:
    return {word for column in table.columns for text in (column.header, *column.cells) for word in str(text).split()}


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_plan_is_whole_at_any_width(width: int) -> None:
    table = peak_table(plan_report(NANO, "a10", OPTIONS)["peaks"])
    words = words_of(table)
    lines = printed(table, width)
    assert max(map(len, lines)) <= width and words <= set(" ".join(lines).split())
    assert {"generate", "images", "features", "KiB", "fits"} < words


def test_a_terminal_narrower_than_the_words_cuts_none() -> None:
    table = Table("peak", "KV")
    table.add_row("generate 8192", "32.1 MiB")
    lines = printed(table, 8)
    assert {"generate", "8192", "32.1", "MiB"} <= set(" ".join(lines).split())


def test_the_widest_column_breaks_first() -> None:
    table = Table("case", "how", box=None)
    table.add_row("encode 2048", "one image and text, computed")
    assert [line[:13].strip() for line in printed(table, 30)[1:]] == ["encode 2048", ""]


def test_piped_no_line_of_a_plan_is_broken(capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(plan_report(NANO, "a10", OPTIONS))
    out = capsys.readouterr().out
    assert "…" not in out and "all, 8 images" in out
    assert [line.split()[0] for line in out.splitlines() if line[:1].isalpha()] == [
        "weights",
        "KV",
        "fits",
        "peak",
        "encode",
        "generate",
        "all,",
        "speed",
    ]


def test_piped_the_rows_of_a_profile_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    how = "KV cache written up to the last token, then two steps; " * 4
    show_table("resident memory of the process", [{"case": "generate 8192", "peak, GiB": "13.49", "how": how}])
    assert how.strip() in capsys.readouterr().out
