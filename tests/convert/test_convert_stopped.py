"""A conversion stopped by a full disk or by kill -9: no incomplete destination, and it resumes."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qvl_runtime.convert.convert import convert
from qvl_runtime.convert.verify import verify
from qvl_runtime.errors import CheckpointError
from qvl_runtime.weights import tensor_file
from tests.convert.kill import SHARD, converting
from tests.gptq_checkpoints import same_files

pytestmark = pytest.mark.cpu


def test_a_disk_that_fills_up(int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tensor_file.os.fsync  # type: ignore[attr-defined]

    def full(handle: int) -> None:
        if os.fstat(handle).st_size > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        before(handle)

    monkeypatch.setattr(tensor_file.os, "fsync", full)  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"the disk is full .* make room and rerun the same command"):
        convert(int4, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    convert(int4, tmp_path / "new")
    assert verify(tmp_path / "new").faults == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", folder]).returncode:
        pytest.skip("mounting a small file system takes root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_small(int4: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="make room for"):
        convert(int4, small_disk / "new")
    usage = shutil.disk_usage(small_disk)._replace(free=1 << 40)  # as if another program filled it meanwhile
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="the disk is full"):
        convert(int4, small_disk / "new")
    assert not (small_disk / "new").exists()


def test_kill_nine_at_ten_moments(int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever a conversion is killed: no incomplete destination, and the same bytes in the end."""
    monkeypatch.setattr("qvl_runtime.convert.shard_writer.SHARD", SHARD)
    began = time.perf_counter()
    convert(int4, tmp_path / "whole")
    span = 1.5 * (time.perf_counter() - began)  # within which it dies; follows how fast the machine is just now
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.convert.kill"])
    generator, kills, resumed = random.Random(0), 0, 0
    goal = tmp_path / "goal"
    for _ in range(40):
        started = context.Event()
        process = context.Process(target=converting, args=(int4, goal, started))
        process.start()
        started.wait(30)
        time.sleep(generator.uniform(0, span))
        process.kill()
        process.join()
        kills += process.exitcode != 0
        if goal.exists():
            assert verify(goal).faults == []
            same_files(goal, tmp_path / "whole")
            shutil.rmtree(goal)
            span *= 0.8
        else:
            journal = tmp_path / ".goal.partial" / "journal.jsonl"
            further = journal.is_file() and len(journal.read_text().splitlines()) > 0
            resumed += further
            span *= 1 if further else 1.25
        if kills == 10:
            break
    assert kills == 10 and resumed > 0
    converting(int4, goal)
    same_files(goal, tmp_path / "whole")
    assert not (tmp_path / ".goal.partial").exists()
