"""What quantizing did to each linear, for people: a table in the terminal and a plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qvl_runtime.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from qvl_runtime.quantize.block import LinearError

PLOTS = (".png", ".svg", ".pdf")


def error_table(errors: Sequence[LinearError]) -> Table:
    """One row a layer, one column a linear: its error in percent, and in brackets that of rounding to nearest.

    Of 76 columns, or less where cells and headings break at their blank.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    linears = list(dict.fromkeys(error.linear for error in errors))
    title = "error of the outputs on held-out conversations, % (rounded to nearest)"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("layer", *(name.replace(".", " ") for name in linears), "s"):
        table.add_column(column, justify="right", vertical="bottom")
    for layer in sorted({error.layer for error in errors}):
        row = {error.linear: error for error in errors if error.layer == layer}
        table.add_row(str(layer), *(_cell([row[name]]) for name in linears), _seconds(row.values()))
    means = [_cell([error for error in errors if error.linear == name]) for name in linears]
    table.add_section()
    table.add_row("mean", *means, _seconds(errors))
    return table


def _cell(errors: Sequence[LinearError]) -> str:
    """Their means, to three digits."""
    means = (sum(values) / len(errors) for values in ([e.error for e in errors], [e.rtn_error for e in errors]))
    own, nearest = (f"{100 * mean:.2f}" if 100 * mean < 9.995 else f"{100 * mean:.1f}" for mean in means)
    return f"{own} ({nearest})"


def _seconds(errors: Iterable[LinearError]) -> str:
    return f"{sum(error.seconds for error in errors):.0f}"


def plottable(path: Path) -> Path:
    """`path`, if a plot can be written there; asked before hours of work, not after them. Raises `ConfigError`."""
    if path.suffix.lower() not in PLOTS:
        raise ConfigError(f"cannot plot to {path}: its name must end in {', '.join(PLOTS)}")
    if not path.parent.is_dir():
        raise ConfigError(f"cannot plot to {path}: the folder {path.parent} does not exist; make it first")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("a plot needs matplotlib: pip install 'qvl-runtime[plot]', or leave --plot out") from None
    return path


def plot_errors(errors: Sequence[LinearError], path: Path, method: str) -> None:
    """Draw the error of each linear against the layer, as it is and rounded to nearest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, linear in enumerate(dict.fromkeys(error.linear for error in errors)):
        own = [error for error in errors if error.linear == linear]
        layers, colour = [error.layer for error in own], f"C{number}"
        axes.plot(layers, [100 * error.error for error in own], "o-", ms=3, color=colour, label=f"{linear}, {method}")
        if method != "rtn":
            axes.plot(layers, [100 * error.rtn_error for error in own], ":", color=colour, label=f"{linear}, nearest")
    axes.set(xlabel="layer", ylabel="error of the outputs, %", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, fontsize=8)
    figure.savefig(path, dpi=120)
