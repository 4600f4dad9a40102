"""A folder in the making: one process at a time, nothing of another's is removed, and a kill releases the lock."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qvl_runtime.cli.app import app
from qvl_runtime.convert.convert import convert
from qvl_runtime.convert.restore import restore
from qvl_runtime.errors import CheckpointError
from qvl_runtime.quantize.quantizer import Quantizer
from qvl_runtime.weights.partial import LOCK, OBSOLETE_KEY, PartialFolder, write_folder
from tests.gptq_checkpoints import same_files
from tests.quantize.quantized import FEW, run

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork"),
]


class Waiting:
    """A process that stops in the middle of its work until it is told to continue."""

    def __init__(self, pid: int, go: int) -> None:
        self.pid, self._go = pid, go

    def finish(self) -> int:
        """Let it continue: its exit code."""
        os.write(self._go, b"x")
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@contextmanager
def waiting(work: Callable[[Callable[[int], None]], object]) -> Iterator[Waiting]:
    """Another process inside `work`, at the first call of its `progress` with something done."""
    (started, tell_started), (go, tell_go) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            stopped: list[int] = []

            def progress(done: int) -> None:
                if done and not stopped:
                    stopped.append(done)
                    os.write(tell_started, b"x")
                    os.read(go, 1)

            work(progress)
            code = 0
        finally:
            os._exit(code)
    os.read(started, 1)
    yield Waiting(pid, tell_go)
    for handle in (started, tell_started, go, tell_go):
        os.close(handle)


def qvl(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"NO_COLOR": "1"})
    return result.exit_code, " ".join(result.stderr.split())


def test_two_quantizations_of_one_destination(source: Path, tmp_path: Path) -> None:
    """The second is refused and says which process has the lock; the model is the first one's alone."""
    target = tmp_path / "out"
    run(source, tmp_path / "alone", FEW)
    with waiting(lambda progress: Quantizer.open(source, target, FEW).run(progress)) as first:
        settings = ("--samples", FEW.samples, "--group", FEW.group_size, "--damping", 0.02, "--quiet")
        code, fault = qvl("quantize", source, target, *settings)
        assert code == 2 and f"another process ({first.pid})" in fault and f".out.partial/{LOCK}" in fault
        assert not target.exists() and (tmp_path / ".out.partial").is_dir()
        assert first.finish() == 0
    assert json.loads((target / "quantize_report.json").read_text())["options"]["damping"] == FEW.damping
    same_files(target, tmp_path / "alone")
    code, fault = qvl("quantize", source, target, *settings)
    assert code == 2 and "exists already" in fault
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "out"]


def test_a_killed_process_releases_the_lock_and_its_work_is_resumed_or_kept(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    run(source, tmp_path / "alone", FEW)
    with waiting(lambda progress: Quantizer.open(source, target, FEW).run(progress)) as first:
        first.kill()
    with pytest.raises(CheckpointError, match=r"other settings \(damping 0.01 instead of 0.02\)"):
        run(source, target, replace(FEW, damping=0.02))
    run(source, target, FEW)
    same_files(target, tmp_path / "alone")


def test_two_ways_back_to_one_destination(int4: Path, tmp_path: Path) -> None:
    convert(int4, tmp_path / "converted")
    target = tmp_path / "back"
    with waiting(lambda progress: restore(tmp_path / "converted", target, progress)) as first:
        code, fault = qvl("convert", tmp_path / "converted", target, "--to", "hf", "--quiet")
        assert code == 2 and f"another process ({first.pid})" in fault and f".back.partial/{LOCK}" in fault
        with pytest.raises(CheckpointError, match="another process"):  # whatever the other one is doing
            convert(int4, target)
        assert first.finish() == 0
    same_files(int4, target)


def test_work_of_another_command_is_not_removed(source: Path, int4: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with waiting(lambda progress: Quantizer.open(source, target, FEW).run(progress)) as first:
        first.kill()
    before = sorted((tmp_path / ".out.partial").iterdir())
    with pytest.raises(CheckpointError, match="unfinished work of 'qvl quantize', and this is 'qvl convert'"):
        convert(int4, target)
    with pytest.raises(CheckpointError, match="unfinished work of 'qvl quantize', and this is 'save'"):
        write_folder(target, "save", lambda folder: None)
    assert sorted((tmp_path / ".out.partial").iterdir()) == before
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / "state.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"holds files and no key.json"):
        convert(int4, tmp_path / "new")


def test_a_removal_that_is_cut_short_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = {"command": "test", "bits": 4}
    with PartialFolder(tmp_path / "out", key) as partial:
        partial.restart()
        assert partial.resumable
        (partial.home / "layer").touch()
        with monkeypatch.context() as patch, pytest.raises(OSError, match="stopped"):
            patch.setattr(Path, "unlink", lambda path, missing_ok=False: (_ for _ in ()).throw(OSError("stopped")))
            partial.restart()
    with PartialFolder(tmp_path / "out", key) as again:
        assert (again.home / OBSOLETE_KEY).is_file() and not again.resumable and again.differences() == []
        again.restart()
        assert sorted(path.name for path in again.home.iterdir()) == ["key.json", LOCK, "model"]
        again.publish()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
