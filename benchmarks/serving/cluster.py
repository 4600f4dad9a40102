"""What a Ray cluster of this machine costs and gains: `python -m benchmarks.serving.cluster`. Needs Ray (`make ray`).

A file of requests is answered by commands of a thread an engine, in turns. For the overhead: `qvl batch`; one actor on
a cluster that was started before; and one of `--ray local`, whose cluster is started and ended with it. Each of these
may use two cores, as pictures are decoded next to the model. For the efficiency: `qvl batch` and the last with all of
their processes on one core; two actors on two; and two `qvl batch` at the same time, a core and half of the rows each,
which is what two cores give without Ray. Each is timed from its start to its end, and from its first answers to its
last. Processor time is read from /proc and told apart by process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from benchmarks.serving.process_times import ProcessTimes
from benchmarks.timing import others, say, setting

CORES = (0, 1)
QUESTIONS = ("What is this?", "Which color is it?", "Box it")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
LOOK_S = 0.5


class Run(NamedTuple):
    """One way to answer the file, timed."""

    seconds: float  # from the start of the command to its end
    rate: float  # rows a second between the first answers and the last
    start: float  # seconds until the first answers
    processor: dict[str, float]  # seconds, by kind of process
    load: float  # cores that other processes used


def write_rows(folder: Path, count: int, pictures: int, shuffled: bool) -> list[bytes]:
    """Requests about pictures of 60 x 40, those about one picture together or in random order."""
    dice, noise = random.Random(1), np.random.default_rng(1)
    for number in range(pictures):
        pixels = noise.integers(0, 256, (5, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((60, 40), Image.Resampling.NEAREST).save(folder / f"{number}.png")
    numbers = sorted(number % pictures for number in range(count))
    if shuffled:
        dice.shuffle(numbers)
    return [
        json.dumps(
            {"id": f"row {row}", "prompt": QUESTIONS[row % 3], "images": [str(folder / f"{number}.png")]}
        ).encode()
        + b"\n"
        for row, number in enumerate(numbers)
    ]


def answered(paths: list[Path]) -> int:
    """Rows in output files, or in the folders of parts."""
    files = [file for path in paths for file in (path.glob("part-*.jsonl") if path.is_dir() else [path])]
    return sum(file.read_bytes().count(b"\n") for file in files if file.exists())


def timed(
    sources: list[Path],
    outs: list[Path],
    options: list[str],
    rows: int,
    cores: list[tuple[int, ...]],
    head: int | None = None,
) -> Run:
    """Run a command for each file at the same time, each on its cores. head: the process of a cluster that they use."""
    environment = os.environ | ENVIRONMENT
    command = [sys.executable, "-m", "qvl_runtime.cli", "batch"]
    load, began = others(), time.perf_counter()
    running = [
        subprocess.Popen([*command, source, out, *options, "--quiet"], env=environment)
        for source, out in zip(sources, outs, strict=True)
    ]
    for process, own in zip(running, cores, strict=True):
        os.sched_setaffinity(process.pid, own)  # before it has started others
    times, marks = ProcessTimes(_roots(running, head)), list[tuple[float, int]]()
    while len([process for process in running if process.poll() is None]):
        time.sleep(LOOK_S)
        if not marks or marks[-1][1] < rows:
            times.look()
            if done := answered(outs):
                marks.append((time.perf_counter() - began, done))
    seconds = time.perf_counter() - began
    if any(process.returncode for process in running) or answered(outs) != rows:
        raise RuntimeError("a command failed")
    (first, before), (last, after) = marks[0], marks[-1]
    used = times.by_kind()
    return Run(seconds, (after - before) / max(last - first, 1e-9), first, used, load() - sum(used.values()) / seconds)


def _roots(running: list[subprocess.Popen[bytes]], head: int | None) -> dict[int, str]:
    commands = dict.fromkeys((process.pid for process in running), "driver")
    return commands if head is None else {**commands, head: "other Ray processes"}


@contextmanager
def cluster() -> Iterator[tuple[int, str]]:
    """A cluster of a node of one core: the process that ends it, and its address."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = int(sock.getsockname()[1])
    binary = str(Path(sys.executable).with_name("ray"))
    with tempfile.TemporaryDirectory(prefix="qvl", ignore_cleanup_errors=True) as folder:  # a short path: sockets
        options = ["--head", "--block", f"--port={port}", "--num-cpus=1", "--include-dashboard=false"]
        head = subprocess.Popen(
            [binary, "start", *options, f"--temp-dir={folder}"],
            env=os.environ | ENVIRONMENT,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            for line in head.stdout or ():
                if "Ray runtime started" in line:
                    break
            yield head.pid, f"127.0.0.1:{port}"
        finally:
            head.terminate()
            head.communicate()


def ways(folder: Path, lines: list[bytes], options: list[str]) -> dict[str, Callable[[], Run]]:
    """The contenders, by name."""
    whole, halves = folder / "all.jsonl", [folder / "half-0.jsonl", folder / "half-1.jsonl"]
    whole.write_bytes(b"".join(lines))
    for start, half in enumerate(halves):
        half.write_bytes(b"".join(lines[start * len(lines) // 2 : (start + 1) * len(lines) // 2]))
    numbers = itertools.count()

    def run(
        sources: list[Path],
        cores: list[tuple[int, ...]],
        actors: int = 0,
        address: str = "local",
        head: int | None = None,
    ) -> Run:
        outs = [folder / f"out-{next(numbers)}" for _ in sources]
        more = ["--ray", address, "--ray-threads", "1", "--ray-actors", str(actors)] if actors else []
        return timed(sources, outs, [*options, *more], len(lines), cores, head)

    def on_a_cluster() -> Run:
        with cluster() as (head, address):
            return run([whole], [CORES], 1, address, head)

    one, two = CORES[:1], CORES[1:]
    return {
        "qvl batch": lambda: run([whole], [CORES]),
        "one actor": on_a_cluster,
        "one local actor": lambda: run([whole], [CORES], 1),
        "qvl batch on a core": lambda: run([whole], [one]),
        "one local actor on a core": lambda: run([whole], [one], 1),
        "two local actors": lambda: run([whole], [CORES], 2),
        "two qvl batch": lambda: run(halves, [one, two]),
    }


def verdict(runs: dict[str, list[Run]]) -> dict[str, float]:
    """What the runs say: medians of the ratios of each turn, since a machine may change its speed between turns."""

    def ratio(way: str, other: str, figure: str) -> float | None:
        pairs = zip(runs.get(way, ()), runs.get(other, ()), strict=False)  # none for a way that was left out
        found = [getattr(one, figure) / getattr(two, figure) for one, two in pairs]
        return statistics.median(found) if found else None

    ratios = {
        "seconds of one actor / of qvl batch": ratio("one actor", "qvl batch", "seconds"),
        "rate of one actor / of qvl batch": ratio("one actor", "qvl batch", "rate"),
        "seconds of one local actor / of qvl batch": ratio("one local actor", "qvl batch", "seconds"),
        "rate of two actors / of one on a core": ratio("two local actors", "one local actor on a core", "rate"),
        "rate of two qvl batch / of one on a core": ratio("two qvl batch", "qvl batch on a core", "rate"),
        "rate of two actors / of two qvl batch": ratio("two local actors", "two qvl batch", "rate"),
    }
    return {name: value for name, value in ratios.items() if value is not None}


def main() -> None:
    """Run all ways in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--pictures", type=int, default=1_000)
    parser.add_argument("--shuffled", action="store_true", help="rows in random order; otherwise by picture")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", default="", help="ways to run, by commas")
    arguments = parser.parse_args()
    say(**setting(), rows=arguments.rows, pictures=arguments.pictures, shuffled=arguments.shuffled)
    options = ["--device", "cpu", "--dtype", arguments.dtype, "--temperature", "0", "--max-tokens", "16"]
    with tempfile.TemporaryDirectory(prefix="qvl") as folder:
        lines = write_rows(Path(folder), arguments.rows, arguments.pictures, arguments.shuffled)
        found = ways(Path(folder), lines, options)
        if arguments.only:
            found = {way: call for way, call in found.items() if way in arguments.only.split(",")}
        runs: dict[str, list[Run]] = {way: [] for way in found}
        for turn in range(arguments.turns):
            for way, call in found.items():
                run = call()
                runs[way].append(run)
                say(way=way, turn=turn, **run._asdict(), processor_ms_a_row=_each(run, arguments.rows))
    say(verdict=verdict(runs))


def _each(run: Run, rows: int) -> float:
    return 1000 * sum(run.processor.values()) / rows


if __name__ == "__main__":
    main()
