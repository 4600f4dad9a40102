"""Compile the GPU kernels without a GPU and report what their machine code costs.

    python -m tools.kernel_report                                     # all, for A100 and H100
    python -m tools.kernel_report --target sm_86 --kernel int4 --json -
    python -m tools.kernel_report --triton all                        # on each supported Triton, which pip fetches
    python -m tools.kernel_report --markdown build/kernels.md

Exit status: 0 all pass, 1 a kernel does not compile or asks for more shared memory than there is, 2 one spills
registers, 3 one misses its bar (issue or pipe time over memory time, the share of 128-bit loads, or no weight in shared
memory), 4 a Triton is missing. The last line counts them. tools/kernel_report/judge.py defines the times.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.kernel_report.judge import Row

TARGETS, DEFAULT = ("sm_80", "sm_86", "sm_89", "sm_90"), ("sm_80", "sm_90")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = parse_arguments(arguments)
    if options.triton:
        return compare(options)
    if find_spec("triton") is None:
        print(
            "triton is not installed, so no kernel can be compiled: pip install 'triton>=3.6' (in a checkout on"
            " Linux, `make setup` does), or let --triton fetch it",
            file=sys.stderr,
        )
        return 4
    from tools.kernel_report.report import report
    from tools.kernel_report.tables import page, text

    rows = report(options.target or DEFAULT, options.kernel, options.sass, options.jobs)
    if not rows:
        print(f"no kernel matches {options.kernel!r}", file=sys.stderr)
        return 1
    as_json = json.dumps([asdict(row) for row in rows], indent=1)
    print(as_json if options.json == "-" else text(rows))
    if options.json and options.json != "-":
        Path(options.json).write_text(as_json + "\n")
    if options.markdown:
        Path(options.markdown).write_text(page(rows) + "\n")
    return complain({"": rows}) if options.json != "-" else 0


def compare(options: argparse.Namespace) -> int:
    """Report on several versions of Triton, one after another; returns the exit status."""
    from tools.kernel_report.versions import FetchError, rows_on, side_by_side, versions

    passed = [f"--target={target}" for target in options.target or ()]
    passed += [f"--kernel={options.kernel}", f"--jobs={options.jobs}"]
    rows: dict[str, list[Row]] = {}
    for version in versions(options.triton):
        try:
            rows[version] = rows_on(version, passed)
        except FetchError as fault:
            print(fault, file=sys.stderr)
            return 4
    print(side_by_side(rows))
    if options.json:
        Path(options.json).write_text(json.dumps({v: [asdict(row) for row in judged] for v, judged in rows.items()}))
    return complain({f"triton {version}": judged for version, judged in rows.items()})


def complain(rows: dict[str, list[Row]]) -> int:
    """Print each fault by Triton's version to standard error, then count them; returns the status of the worst."""
    faults = [(version, row, fault) for version, judged in rows.items() for row in judged for fault in row.faults]
    for version, row, fault in faults:
        print(" ".join(filter(None, (version, row.kernel, row.target, fault.text))), file=sys.stderr)
    print(summary(rows.values(), [fault.status for _, _, fault in faults]), file=sys.stderr)
    return min((fault.status for _, _, fault in faults), default=0)


def summary(rows: Iterable[Sequence[Row]], statuses: Sequence[int]) -> str:
    """One line that counts kernels and their faults."""
    from tools.kernel_report.judge import MOST_SPILLED

    judged = [row for version in rows for row in version]
    few = sum(row.spilled > 0 and not any(fault.status == 2 for fault in row.faults) for row in judged)
    counts = [f"{statuses.count(1)} do not compile", f"{statuses.count(2)} spill registers"]
    counts += [f"{statuses.count(3)} bars missed"]
    tolerated = f" ({few} spill {MOST_SPILLED} bytes or less)" if few else ""
    return f"{len(judged)} kernels: {', '.join(counts)}{tolerated}"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help=f"default: {' and '.join(DEFAULT)}")
    parser.add_argument("--kernel", default="", help="only kernels whose name matches this regular expression")
    parser.add_argument(
        "--triton", action="append", metavar="VERSION", help="all, oldest, newest or a number; default: the installed"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; default: one a core")
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON ('-': standard output, no table)")
    parser.add_argument("--markdown", metavar="FILE", help="write the table and the decode steps as Markdown")
    parser.add_argument("--sass", metavar="DIR", help="keep the disassembly of every kernel here")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
