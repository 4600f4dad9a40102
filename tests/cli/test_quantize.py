"""`qvl quantize`: its output, its errors, its table and its plot."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from qvl_runtime.cli.app import app
from qvl_runtime.cli.quantize import check_plottable, error_table, plot_errors
from qvl_runtime.cli.terminal import print_table
from qvl_runtime.engine.engine import NANO
from qvl_runtime.errors import ConfigError
from qvl_runtime.quantize.block import LinearError

pytestmark = pytest.mark.cpu


def qvl(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["quantize", *arguments], env={"NO_COLOR": "1", "COLUMNS": "100"})


def test_nano_in_json(tmp_path: Path) -> None:
    result = qvl(str(NANO), str(tmp_path / "out"), "--samples", "4", "--json", "--group", "64")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert len(report["linears"]) == 4 * 5 and report["options"]["group_size"] == 64 and report["seconds"] > 0
    assert "4 conversations of the built-in set" in result.stderr
    assert json.loads((tmp_path / "out" / "quantize_report.json").read_text())["linears"] == report["linears"]


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    result = qvl(str(NANO), str(tmp_path / "out"), "--samples", "4", "--dry-run", "--quiet")
    assert result.exit_code == 0 and "memory up to about" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--group", "48"], "group size is 48; supported are 32, 64, 128, -1"),
        (["--act-order", "yes"], "order is 'yes'; supported are 'none', 'static', 'full'"),
        (["--calibration", "none.json"], "none.json cannot be read"),
        (["--plot", "errors.txt"], "its name must end in .png"),
        (["--damping", "0"], "damping is 0.0; expected a positive number"),
    ],
)
def test_an_invalid_option_is_one_line_and_exit_code_2(arguments: list[str], fault: str, tmp_path: Path) -> None:
    result = qvl(str(NANO), str(tmp_path / "out"), *arguments)
    assert result.exit_code == 2 and fault in result.stderr and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


ERRORS = [
    LinearError(layer, linear, 0.01 * (layer + 1), 0.03, 0.01, 2.0)
    for layer in range(3)
    for linear in ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_is_whole_at_any_width(width: int) -> None:
    """Errors of one and of two digits before the point, with their mean; seconds as a full-size model takes them."""
    errors = [e._replace(error=e.error * 3, rtn_error=0.132, seconds=26.4) for e in ERRORS] + [
        e._replace(layer=31, error=0.1516, rtn_error=0.2046) for e in ERRORS if e.layer == 0
    ]
    console = Console(width=width, record=True, force_terminal=False, file=io.StringIO())
    print_table(error_table(errors), console)
    lines = console.export_text().splitlines()
    assert all(len(line) <= width for line in lines) and not any("…" in line for line in lines)
    words = " ".join(lines).split()
    counts = {"3.00": 5, "6.00": 5, "9.00": 5, "15.2": 5, "(13.2)": 15, "(20.5)": 5, "132": 3, "10": 1}
    assert {number: words.count(number) for number in counts} == counts
    if width >= 80:
        rows = {cells[0]: cells[1:] for cells in map(str.split, lines) if cells}
        assert rows["31"] == [*["15.2", "(20.5)"] * 5, "10"]
        assert rows["mean"] == [*["8.29", "(15.0)"] * 5, "406"]


def test_piped_the_table_has_its_natural_width(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(error_table([e._replace(error=1.5, rtn_error=2.5) for e in ERRORS]))  # 82 columns
    lines = capsys.readouterr().out.splitlines()
    assert sum("150.0 (250.0)  150.0 (250.0)" in line for line in lines) == 4


def test_the_plot_is_an_image(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    check_plottable(tmp_path / "errors.png")
    plot_errors(ERRORS, tmp_path / "errors.png", "gptq")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="does not exist: create it first"):
        check_plottable(tmp_path / "deep" / "errors.png")
