"""The kernels on each supported Triton: fetch a version into a folder, and run the report on it in a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.kernel_report.judge import Row

# What torch 2.11, 2.13 and 2.14 bring along, and the newest.
SUPPORTED = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
NAMED = {"all": SUPPORTED, "oldest": SUPPORTED[:1], "newest": SUPPORTED[-1:]}
FOLDER = Path("build/triton")


class FetchError(Exception):
    """A version of Triton could not be installed."""


def versions(names: Sequence[str]) -> list[str]:
    """Version numbers of "all", "oldest", "newest" or numbers themselves, each once."""
    return list(dict.fromkeys(version for name in names for version in NAMED.get(name, (name,))))


def fetch(version: str) -> Path:
    """The folder that holds this version, installed by pip the first time; raises FetchError."""
    folder = FOLDER / version
    if folder.is_dir():
        return folder
    partial = FOLDER / f".{version}.partial"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--upgrade", "--target", str(partial), f"triton=={version}"]
    print(f"fetching triton {version} into {folder}", file=sys.stderr)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FetchError(f"triton {version} could not be installed: {(done.stderr.strip().splitlines() or [''])[-1]}")
    partial.rename(folder)
    return folder


def rows_on(version: str, arguments: Sequence[str]) -> list[Row]:
    """The report's rows on a version, from a process that imports it; raises FetchError."""
    paths = [str(fetch(version).absolute()), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "tools.kernel_report", "--json", "-", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    try:
        return [Row(**row) for row in json.loads(done.stdout)]
    except ValueError:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise FetchError(f"the report on triton {version} ended with status {done.returncode}: {last}") from None


def side_by_side(rows: dict[str, list[Row]]) -> str:
    """Aligned columns: registers, spilled bytes and ratio of each kernel on each version."""
    by_kernel: dict[tuple[str, str], dict[str, str]] = {}
    for version, judged in rows.items():
        for row in judged:
            by_kernel.setdefault((row.kernel, row.target), {})[version] = _cell(row)
    lines = [["kernel", "target", *rows], ["", "", *["regs spill ratio"] * len(rows)]]
    lines += [[*key, *(cells.get(version, "") for version in rows)] for key, cells in by_kernel.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _cell(row: Row) -> str:
    if row.error:
        return "FAILED"
    return f"{row.registers:4} {row.spilled:5} {row.ratio:5.2f}{'!' if row.faults else ''}"
