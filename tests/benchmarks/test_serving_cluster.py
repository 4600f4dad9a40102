"""What the comparison with a Ray cluster is computed from."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.serving.cluster import Run, answered, verdict, write_rows
from benchmarks.serving.process_times import ProcessTimes

pytestmark = pytest.mark.unit


def test_the_verdict_is_the_median_of_each_turn() -> None:
    def run(seconds: float, rate: float) -> Run:
        return Run(seconds, rate, 1.0, {}, 0.0)

    runs = {
        "one local actor on a core": [run(10, 100), run(20, 50), run(10, 100)],
        "two local actors": [run(5, 190), run(10, 95), run(5, 100)],
    }
    assert verdict(runs) == {"rate of two actors / of one on a core": 1.9}


def test_rows_are_those_of_a_batch_and_answers_are_counted(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in write_rows(tmp_path, 6, 2, False)]
    assert [line["images"][0][-5:] for line in lines] == ["0.png"] * 3 + ["1.png"] * 3
    assert len({line["id"] for line in lines}) == 6
    (tmp_path / "part-00000.jsonl").write_text("a\nb\n")
    assert answered([tmp_path, tmp_path / "part-00000.jsonl", tmp_path / "none.jsonl"]) == 4


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_processor_time_of_a_process_and_its_child_is_told_apart() -> None:
    child = "import sys; 'gcs_server'\nfor _ in range(10**7): pass\nsys.stdin.read()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE)
    try:
        times, end = ProcessTimes({process.pid: "driver"}), time.monotonic() + 20
        while times.by_kind().get("gcs", 0.0) < 0.05 and time.monotonic() < end:
            time.sleep(0.05)
            times.look()
        assert set(times.by_kind()) == {"driver", "gcs"} and times.by_kind()["gcs"] >= 0.05
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(20)
