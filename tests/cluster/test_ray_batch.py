"""`qvl batch --ray` on a cluster of this machine: the same answers as `qvl batch`, each once, whatever is killed.

QVL_KILLS: how many kills of each kind (2; the issue's ten take half an hour).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from qvl_runtime import Engine
from qvl_runtime.cli.batch import run_batch
from qvl_runtime.cluster.connect import connect
from qvl_runtime.cluster.pool import ActorPool
from tests.cluster.ray_helpers import ENGINE, GREEDY, Deadly, Mortal, answers, parts, run, write_rows

pytest.importorskip("ray", reason="Ray is not installed: make ray")
pytestmark = [pytest.mark.cpu, pytest.mark.timeout(1800)]
KILLS = int(os.environ.get("QVL_KILLS", "2"))


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    ray = connect("local", cpus=3)
    yield ray
    ray.shutdown()


@pytest.mark.parametrize("actors", [2, 3])
def test_answers_are_those_of_a_batch_without_ray(ray: Any, actors: int, tmp_path: Path) -> None:
    bad = ({"id": "no", "prompt": "?", "images": ["missing.png"]}, ["no object"], {"id": "no 2", "params": {}})
    path = write_rows(tmp_path, 60, extra=bad)
    list(run_batch(Engine(**ENGINE), path, tmp_path / "plain.jsonl", GREEDY))
    progress = run(ray, path, tmp_path / "out", actors)
    assert (progress.done, progress.errors, progress.lost) == (63, 3, 0)
    assert answers(*parts(tmp_path / "out")) == answers(tmp_path / "plain.jsonl")
    before = list(parts(tmp_path / "out"))
    assert run(ray, path, tmp_path / "out", actors).done == 63 and list(parts(tmp_path / "out")) == before


def test_an_actor_uses_the_threads_that_it_was_given(ray: Any, tmp_path: Path) -> None:
    seen: list[Any] = []
    run(ray, write_rows(tmp_path, 20), tmp_path / "out", 1, watch=lambda pool, _: seen.extend(pool.reports()))
    assert seen[-1]["threads"] == 1 and seen[-1]["pid"] != os.getpid()


def test_actors_are_killed_and_every_row_is_answered_once(ray: Any, tmp_path: Path) -> None:
    dice, count = random.Random(1), 150 + 50 * KILLS
    path = write_rows(tmp_path, count)
    at = sorted(dice.sample(range(1, count - 100), KILLS), reverse=True)

    def kill(pool: ActorPool, progress: Any) -> None:
        if at and progress.done >= at[-1] and (alive := pool.reports()):  # none while both are being started
            at.pop()
            os.kill(dice.choice(alive)["pid"], signal.SIGKILL)

    progress = run(ray, path, tmp_path / "out", 2, watch=kill)
    assert not at and progress.lost >= 1
    found = [json.loads(line) for part in parts(tmp_path / "out") for line in part.open()]
    assert sorted(record["index"] for record in found) == list(range(count))


@pytest.mark.parametrize("kind", [Deadly, Mortal])
def test_a_row_that_kills_two_actors_is_an_error_and_the_others_are_answered(
    ray: Any, kind: Any, tmp_path: Path
) -> None:
    path = write_rows(tmp_path, 20, extra=({"id": "k", "prompt": "deadly"},))
    progress = run(ray, path, tmp_path / "out", 2, kind)
    assert (progress.done, progress.errors, progress.lost) == (21, 1, 2)
    failed = [json.loads(line) for part in parts(tmp_path / "out") for line in part.open() if '"error"' in line]
    assert failed[0]["id"] == "k" and "2 actors died while they answered this request" in failed[0]["error"]


def start(folder: Path, *options: str) -> subprocess.Popen[bytes]:
    """`qvl batch --ray`, in a process group of its own."""
    command = [sys.executable, "-m", "qvl_runtime.cli", "batch", str(folder / "requests.jsonl"), str(folder / "out")]
    options = ("--dtype", "float32", "--temperature", "0", "--max-tokens", "16", "--ray-threads", "1", *options)
    return subprocess.Popen([*command, *options], stderr=subprocess.PIPE, start_new_session=True)


def lines(folder: Path) -> int:
    return sum(len(part.read_bytes().splitlines()) for part in parts(folder / "out"))


def test_the_driver_is_killed_and_resumes(tmp_path: Path) -> None:
    """With --ray local its cluster dies along with it, as the head's node would."""
    dice, count = random.Random(2), 300
    write_rows(tmp_path, count)
    for kill in range(KILLS):
        driver = start(tmp_path, "--ray", "local", "--ray-actors", "2")
        goal = min(count - 1, lines(tmp_path) + dice.randint(1, count // KILLS))
        while driver.poll() is None and lines(tmp_path) < goal:
            time.sleep(0.05)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        assert kill == KILLS - 1 or lines(tmp_path) >= 1
    last = start(tmp_path, "--ray", "local", "--ray-actors", "2")
    assert last.communicate()[1] is not None and last.returncode == 0
    found = [json.loads(line) for part in parts(tmp_path / "out") for line in part.open()]
    assert sorted(record["index"] for record in found) == list(range(count))


def head(folder: str, port: int) -> list[int]:
    """Start a head node of its own; the ids of its processes."""
    binary = str(Path(sys.executable).with_name("ray"))
    options = ["--head", f"--port={port}", "--num-cpus=2", "--include-dashboard=false", f"--temp-dir={folder}"]
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    subprocess.run([binary, "start", *options], check=True, capture_output=True, env=environment)
    return processes(folder)


def processes(folder: str) -> list[int]:
    """Those whose command line has the folder of a cluster."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if folder.encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:  # it has ended
            continue
    return found


def test_the_head_is_killed_and_the_job_resumes_on_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All processes of the head's node at once; the driver, whose cluster is gone, ends with an error."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # a token that a user may have is none of this test's
    dice, count = random.Random(3), 150 * (KILLS + 1)
    write_rows(tmp_path, count)
    for kill in range(KILLS + 1):
        folder = tempfile.mkdtemp(prefix="qvlray", dir="/tmp")  # short: it has sockets
        with socket.create_server(("127.0.0.1", 0)) as sock:
            port = int(sock.getsockname()[1])
        try:
            head(folder, port)
            driver = start(tmp_path, "--ray", f"127.0.0.1:{port}", "--ray-actors", "2")
            goal = count if kill == KILLS else lines(tmp_path) + dice.randint(1, max(1, count // (KILLS + 1)))
            while driver.poll() is None and lines(tmp_path) < goal:
                time.sleep(0.05)
            if kill < KILLS:
                for process in processes(folder):
                    with suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
            said = driver.communicate(timeout=180)[1]
            assert kill == KILLS or lines(tmp_path) > 0, said[-2000:]
            assert (driver.returncode == 0) == (lines(tmp_path) == count), said[-2000:]
        finally:
            for process in processes(folder):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            shutil.rmtree(folder, ignore_errors=True)
    found = [json.loads(line) for part in parts(tmp_path / "out") for line in part.open()]
    assert sorted(record["index"] for record in found) == list(range(count))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ray", "127.0.0.1:1"), b"there is no Ray cluster at '127.0.0.1:1'"),
        (("--ray", "local", "--device", "cuda"), b"no node of the cluster has a GPU, which --device asks for"),
        (("--ray", "local", "--model", "/nowhere"), b"/nowhere"),
    ],
)
def test_what_cannot_run_says_so_on_one_line(options: tuple[str, ...], message: bytes, tmp_path: Path) -> None:
    write_rows(tmp_path, 2)
    process = start(tmp_path, *options)
    said = process.communicate()[1].strip().splitlines()
    assert process.returncode == 2 and message in said[-1]
