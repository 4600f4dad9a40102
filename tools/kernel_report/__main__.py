"""Compile the GPU kernels without a GPU and report what their machine code costs.

    python -m tools.kernel_report                                     # all, for A100 and H100
    python -m tools.kernel_report --target sm_90 --kernel int4 --json -
    python -m tools.kernel_report --markdown build/kernels.md

Exit status: 0 all pass, 1 a kernel does not compile, 2 one spills registers, 3 one misses its bar (issue or pipe time
over memory time, or the share of 128-bit loads), 4 triton is not installed. tools/kernel_report/judge.py defines the
times.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qvl_kernels.triton.launch import Spec
    from tools.kernel_report.judge import Row

TARGETS = ("sm_80", "sm_90")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = parse_arguments(arguments)
    if find_spec("triton") is None:
        print("triton is not installed, so no kernel can be compiled: run `make triton`", file=sys.stderr)
        return 4
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted functions cannot be compiled
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # pins what Triton 3.9 only warns about
    from qvl_kernels.aot import aot_specs
    from tools.kernel_report.tables import page, text

    rows = report(aot_specs, options.target or TARGETS, options.kernel, options.sass)
    if not rows:
        print(f"no kernel matches {options.kernel!r}", file=sys.stderr)
        return 1
    as_json = json.dumps([asdict(row) for row in rows], indent=1)
    print(as_json if options.json == "-" else text(rows))
    if options.json and options.json != "-":
        Path(options.json).write_text(as_json + "\n")
    if options.markdown:
        Path(options.markdown).write_text(page(rows) + "\n")
    return complain(rows)


def report(
    specs: Callable[[int], Iterable[Spec]], targets: Sequence[str], pattern: str = "", sass: str | None = None
) -> list[Row]:
    """Compile and judge every matching kernel for each target; save disassemblies in the folder `sass`."""
    from tools.kernel_report.judge import judge
    from tools.kernel_report.machines import MACHINES

    rows = []
    for target in targets:
        for spec in specs(MACHINES[target].gpu.capability):
            if not re.search(pattern, spec.name):
                continue
            row, code = judge(spec, target)
            rows.append(row)
            if sass and code:
                Path(sass).mkdir(parents=True, exist_ok=True)
                stem = re.sub(r"\W+", "_", f"{row.kernel} {target}")
                (Path(sass) / f"{stem}.sass").write_text(code)
    return rows


def complain(rows: Iterable[Row]) -> int:
    """Print each fault to standard error; returns the exit status of the worst."""
    faults = [(row, fault) for row in rows for fault in row.faults]
    for row, fault in faults:
        print(f"{row.kernel} {row.target} {fault.text}", file=sys.stderr)
    return min((fault.status for _, fault in faults), default=0)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--kernel", default="", help="only kernels whose name matches this regular expression")
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON ('-': standard output, no table)")
    parser.add_argument("--markdown", metavar="FILE", help="write the table and the decode steps as Markdown")
    parser.add_argument("--sass", metavar="DIR", help="keep the disassembly of every kernel here")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
