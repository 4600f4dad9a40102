"""`qvl quantize`: from options to a finished checkpoint, with progress and a report."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qvl_runtime.cli.quantize_report import error_table, plot_errors, plottable
from qvl_runtime.cli.terminal import print_table, progress_bar, say, size, working

if TYPE_CHECKING:
    from qvl_runtime.quantize.quantizer import Quantizer


class QuantizeRequest(NamedTuple):
    """What was asked for on the command line."""

    source: str
    destination: Path
    calibration: Path | None
    device: str
    plot: Path | None
    dry_run: bool
    as_json: bool
    quiet: bool
    options: Mapping[str, Any]  # the fields of `QuantizeOptions`


def quantize_checkpoint(asked: QuantizeRequest) -> int:
    """Check, quantize, report; an exit code. Raises the errors of `Quantizer`."""
    if asked.plot is not None:
        plottable(asked.plot)
    with working(f"reading {asked.source} and the conversations"):
        from qvl_runtime.host import choose_device, free_memory
        from qvl_runtime.quantize.quantizer import QuantizeOptions, Quantizer
        from qvl_runtime.weights.hub import resolve_model

        device = choose_device(asked.device)
        options = QuantizeOptions(**asked.options)
        quantizer = Quantizer.open(resolve_model(asked.source), asked.destination, options, asked.calibration, device)
    quantizer.refuse_beyond(free_memory(device))
    if not asked.quiet or asked.dry_run:
        for line in _outline(quantizer, asked):
            say(line)
    if asked.dry_run:
        return 0
    began = time.perf_counter()
    with progress_bar("linears", quantizer.linears, shown=not asked.quiet) as advance:
        errors = quantizer.run(advance)
    if asked.plot is not None:
        plot_errors(errors, asked.plot, options.method)
    if asked.as_json:
        report = quantizer.report(errors)
        print(json.dumps(report | {"seconds": time.perf_counter() - began}, ensure_ascii=False))
    elif not asked.quiet:
        print_table(error_table(errors))
    if not asked.quiet:
        say(f"{asked.destination} is done, {size(quantizer.outline().result)} in {time.perf_counter() - began:.0f} s")
    return 0


def _outline(quantizer: Quantizer, asked: QuantizeRequest) -> list[str]:
    outline, where = quantizer.outline(), asked.calibration or "the built-in set"
    cut = f", {outline.shortened} of them cut to --max-tokens" if outline.shortened else ""
    return [
        f"{outline.conversations} conversations of {where}{cut}: {outline.rows:,} tokens to calibrate on",
        f"memory about {size(outline.memory)} at most, disk {size(outline.disk)} on the way, {size(outline.result)} "
        "in the end",
    ]
