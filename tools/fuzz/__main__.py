"""Feed random and damaged input to the runtime for a while, and report what is neither answered nor refused.

    python -m tools.fuzz --seconds 600                    # all targets, in turn; `make fuzz`
    python -m tools.fuzz --only images,prompts --seed 7
    python -m tools.fuzz --only images --case 123456      # one case again, with its traceback

A case is its target and its number. Each target runs in a process of its own, which is replaced after a crash or a
hang. Failures go to the file of `--keep`, one JSON object a line. Exit status: 0 none, 1 some.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import selectors
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

SILENCE_S = 60.0  # without a word from a target it hangs in native code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = parse_arguments(arguments)
    from tools.fuzz.files import TARGETS as FILES
    from tools.fuzz.requests import TARGETS as REQUESTS

    targets = {target.name: target for target in (*REQUESTS, *FILES)}
    names = options.only.split(",") if options.only else list(targets)
    if unknown := sorted(set(names) - set(targets)):
        print(f"error: no target is named {unknown[0]!r}; expected some of {', '.join(targets)}", file=sys.stderr)
        return 2
    if options.serve or options.case is not None:
        from tools.fuzz.harness import run_cases

        numbers: Iterator[int] = count(options.first) if options.case is None else iter([options.case])
        run_cases(targets[names[0]], numbers, lambda line: print(json.dumps(line), flush=True))
        return 0
    failures: list[dict[str, Any]] = []
    for name in names:
        failures += fuzz(name, options.seconds / len(names), options.seed)
    if options.keep and failures:
        options.keep.parent.mkdir(parents=True, exist_ok=True)
        with options.keep.open("a") as file:
            file.writelines(json.dumps(failure) + "\n" for failure in failures)
        print(f"{len(failures)} failures are in {options.keep}", file=sys.stderr)
    return 1 if failures else 0


def fuzz(name: str, seconds: float, seed: int) -> list[dict[str, Any]]:
    """Run one target for some seconds; returns its failures, crashes and hangs included."""
    end, first = time.monotonic() + seconds, random.Random(seed).getrandbits(32)
    failures: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    while time.monotonic() < end or not counts:
        last, ended = first, ""
        lines = _Served(name, first)
        for line in lines.read(end):
            last = line.get("case", last)
            if "failed" in line:
                failures.append({"target": name, "case": line["failed"], "why": line["why"]})
                print(f"{name} {line['failed']}: {line['why']}", file=sys.stderr, flush=True)
            if "counts" in line:
                lines.counts = Counter(line["counts"])
        ended = lines.stop(end)
        counts += lines.counts
        if not ended:
            break
        failures.append({"target": name, "case": last, "why": ended})
        print(f"{name} {last}: {ended}", file=sys.stderr, flush=True)
        first = last + 1
    total = sum(counts.values()) + len(failures)
    print(f"{name}: {total} cases, {counts['answered']} answered, {counts['refused']} refused, {len(failures)} failed")
    return failures


class _Served:
    """A process that runs cases of a target until it is stopped."""

    def __init__(self, name: str, first: int) -> None:
        command = [sys.executable, "-m", "tools.fuzz", "--serve", "--only", name, "--first", str(first)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._hangs = False
        self.counts: Counter[str] = Counter()

    def read(self, end: float) -> Iterator[dict[str, Any]]:
        """What it reports, until `end` or until it is silent for too long; the first word may come after `end`."""
        assert self._process.stdout is not None
        descriptor, heard, buffer = self._process.stdout.fileno(), 0, b""
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while time.monotonic() < end or heard < 2:
                if not selector.select(SILENCE_S):
                    self._hangs = True
                    return
                data = os.read(descriptor, 1 << 16)
                if not data:
                    return
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    heard += 1
                    yield json.loads(line)

    def stop(self, end: float) -> str:
        """End it; returns why it ended before its time, or nothing."""
        code = self._process.poll()
        if code is None and time.monotonic() < end and not self._hangs:
            code = self._process.wait(SILENCE_S)
        self._process.kill()
        self._process.wait()
        if self._hangs:
            return f"hangs: nothing for {SILENCE_S:.0f} s, not even the limit of its time"
        return "" if code is None else f"the process ended with status {code}"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="in all, shared by the targets; default: 600")
    parser.add_argument("--only", metavar="TARGETS", help="separated by commas; default: all")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the time")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="append failures here")
    parser.add_argument("--case", type=int, metavar="NUMBER", help="run this one case of --only")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
