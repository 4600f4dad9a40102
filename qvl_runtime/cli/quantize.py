"""`qvl quantize`: quantize a float checkpoint, with progress, an error table and an error plot."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from qvl_runtime.cli.options import AsJson, Debug, Download, Hub, Quiet, model_folder
from qvl_runtime.cli.terminal import print_json, print_table, progress_bar, say, size, working
from qvl_runtime.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from qvl_runtime.quantize.block import LinearError, Method
    from qvl_runtime.quantize.options import QuantizeOptions
    from qvl_runtime.quantize.quantizer import Quantizer
    from qvl_runtime.quantize.solver import Order

PLOT_SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class QuantizationOptions:
    """How to quantize, and the conversations to calibrate on."""

    method: Annotated[str, typer.Option(metavar="NAME", help="gptq, or rtn (round to nearest).")] = "gptq"
    bits: Annotated[int, typer.Option(metavar="N", help="Bits per weight: 4 or 8.")] = 4
    group: Annotated[
        int, typer.Option(metavar="N", help="Group size (inputs that share a scale): 32, 64, 128, or -1 for all.")
    ] = 128
    asym: Annotated[bool, typer.Option("--asym", help="Asymmetric quantization (per-group zero points).")] = False
    act_order: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Activation order. static: quantize the most important inputs first, in unchanged groups; "
            "full: form the groups in that order, too (desc_act, slower inference); none: in storage order.",
        ),
    ] = "static"
    damping: Annotated[
        float, typer.Option(metavar="X", help="Hessian damping, as a fraction of the mean diagonal.")
    ] = 0.01
    drift: Annotated[
        float,
        typer.Option(
            metavar="X", help="Fraction of the upstream quantization error to compensate (GPTAQ); 0 = plain GPTQ."
        ),
    ] = 0.5
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Conversations in Qwen-VL's fine-tuning JSON. Default: a built-in set."),
    ] = None
    samples: Annotated[
        int, typer.Option(metavar="N", help="Number of conversations; an eighth of them is held out.")
    ] = 64
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Truncate conversations to N tokens.")] = 512

    def resolve(self) -> QuantizeOptions:
        """The library's options. Raises `ConfigError` for a value out of range."""
        from qvl_runtime.quantize.options import QuantizeOptions

        return QuantizeOptions(
            method=cast("Method", self.method),
            bits=self.bits,
            group_size=self.group,
            sym=not self.asym,
            order=cast("Order", self.act_order),
            damping=self.damping,
            drift=self.drift,
            samples=self.samples,
            max_tokens=self.max_tokens,
        )


def quantize(
    *,
    source: Annotated[str, typer.Argument(metavar="SRC", help="A float checkpoint: a folder or a hub id.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The folder to create.")],
    options: QuantizationOptions,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda or cuda:N.")] = "auto",
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Plot the errors (needs matplotlib).")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the inputs, print the memory and disk needed, and exit.")
    ] = False,
    download: Download = False,
    hub: Hub = "huggingface",
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Quantize a float checkpoint with GPTQ to the format of Qwen-VL-Chat-Int4.

    Only one layer is in memory at a time; the vision encoder stays floating point.

    If interrupted, even by kill -9, rerun the same command to resume after the last finished layer.

    [cyan]qvl quantize my-finetune my-finetune-int4 --calibration train.json[/cyan]

    [cyan]qvl quantize Qwen/Qwen-VL-Chat chat-int4 --group 64 --plot errors.png[/cyan]
    """
    if plot is not None:
        check_plottable(plot)
    with working(f"reading {source} and the calibration set"):
        from qvl_runtime.host import choose_device, free_memory
        from qvl_runtime.quantize.quantizer import Quantizer

        torch_device = choose_device(device)
        quantizer = Quantizer.open(
            model_folder(source, download, hub), destination, options.resolve(), options.calibration, torch_device
        )
    quantizer.check_memory(free_memory(torch_device))
    if not quiet or dry_run:
        for line in outline_lines(quantizer, options.calibration):
            say(line)
    if dry_run:
        return 0
    began = time.perf_counter()
    with progress_bar("linears", quantizer.num_linears, shown=not quiet) as advance:
        errors = quantizer.run(advance)
    seconds = time.perf_counter() - began
    if plot is not None:
        plot_errors(errors, plot, options.method)
    if as_json:
        print_json(quantizer.report(errors) | {"seconds": seconds})
    elif not quiet:
        print_table(error_table(errors))
    if not quiet:
        say(f"wrote {destination}, {size(quantizer.estimate().result)}, in {seconds:.0f} s")
    return 0


def outline_lines(quantizer: Quantizer, calibration: Path | None) -> list[str]:
    """What the run will read and need: calibration tokens, memory and disk."""
    estimate = quantizer.estimate()
    truncated = f", {estimate.shortened} of them truncated to --max-tokens" if estimate.shortened else ""
    return [
        f"{estimate.conversations} conversations of {calibration or 'the built-in set'}{truncated}: "
        f"{estimate.tokens:,} calibration tokens",
        f"memory up to about {size(estimate.memory)}, disk {size(estimate.disk)} while running, "
        f"{size(estimate.result)} when done",
    ]


def error_table(errors: Sequence[LinearError]) -> Table:
    """One row per layer, one column per linear: its error in percent, and in parentheses that of round-to-nearest.

    76 characters wide, or less where cells and headings wrap.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    linears = list(dict.fromkeys(error.linear for error in errors))
    title = "output error on held-out conversations, % (round-to-nearest)"
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
    """The mean error and the mean round-to-nearest error, to three digits."""
    means = (sum(values) / len(errors) for values in ([e.error for e in errors], [e.rtn_error for e in errors]))
    error, rtn_error = (f"{100 * mean:.2f}" if 100 * mean < 9.995 else f"{100 * mean:.1f}" for mean in means)
    return f"{error} ({rtn_error})"


def _seconds(errors: Iterable[LinearError]) -> str:
    return f"{sum(error.seconds for error in errors):.0f}"


def check_plottable(path: Path) -> None:
    """Raise `ConfigError` if no plot can be written to `path`; called before hours of work, not after them."""
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise ConfigError(f"cannot plot to {path}: its name must end in {', '.join(PLOT_SUFFIXES)}")
    if not path.parent.is_dir():
        raise ConfigError(f"cannot plot to {path}: the folder {path.parent} does not exist: create it first")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("a plot needs matplotlib: pip install 'qvl-runtime[plot]', or drop --plot") from None


def plot_errors(errors: Sequence[LinearError], path: Path, method: str) -> None:
    """Plot the error of each linear against the layer, as quantized and as rounded to nearest."""
    from matplotlib.figure import Figure

    from qvl_runtime.weights.files import replace_file

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, linear in enumerate(dict.fromkeys(error.linear for error in errors)):
        rows = [error for error in errors if error.linear == linear]
        layers, color = [row.layer for row in rows], f"C{number}"
        axes.plot(layers, [100 * row.error for row in rows], "o-", ms=3, color=color, label=f"{linear}, {method}")
        if method != "rtn":
            axes.plot(layers, [100 * row.rtn_error for row in rows], ":", color=color, label=f"{linear}, nearest")
    axes.set(xlabel="layer", ylabel="output error, %", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, fontsize=8)
    replace_file(path, lambda partial: figure.savefig(partial, dpi=120, format=path.suffix[1:].lower()))
