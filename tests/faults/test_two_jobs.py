"""Two commands with one destination, full disks, and work that was left: none of it is lost or mixed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.convert.convert import ConvertOptions, convert
from qvl_runtime.convert.restore import restore
from qvl_runtime.errors import CheckpointError, ConfigError
from qvl_runtime.quantize.quantizer import Quantizer
from qvl_runtime.weights.files import replace_file
from qvl_runtime.weights.partial import LOCK, PartialFolder
from tests.checkpoints import MakeState, Write
from tests.gptq_checkpoints import same_files
from tests.quantize.quantized import FEW, digest, run
from tests.weights.test_partial import waiting

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")]
SHARDS = "qvl_runtime.convert.shard_writer.SHARD"


def left_conversion(source: Path, target: Path) -> None:
    """Unfinished work with at least one file of it complete: its process was killed."""
    with waiting(lambda progress: convert(source, target, progress=lambda done: progress(done > 100_000))) as first:
        first.kill()
    assert (target.with_name(f".{target.name}.partial") / "journal.jsonl").read_text()


@pytest.fixture(scope="module")
def left_quantization(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a quantization that was killed in its second layer."""
    target = tmp_path_factory.mktemp("left") / "out"
    with waiting(lambda progress: Quantizer.open(source, target, FEW).run(lambda n: progress(n > 6))) as first:
        first.kill()
    return target.with_name(".out.partial")


@pytest.mark.parametrize("damping", [0.02, FEW.damping])
def test_a_second_quantization_is_refused_before_it_reads(
    source: Path, tmp_path: Path, damping: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    with waiting(lambda progress: Quantizer.open(source, target, FEW).run(progress)) as first:
        monkeypatch.setattr("qvl_runtime.quantize.quantizer.read_calibration", None)
        monkeypatch.setattr("qvl_runtime.quantize.quantizer._check_float16_range", None)
        with pytest.raises(CheckpointError) as caught:
            Quantizer.open(source, target, replace(FEW, damping=damping))
        assert f"another process ({first.pid}) is writing" in str(caught.value) and LOCK in str(caught.value)
        assert ("with damping 0.01 instead of 0.02" in str(caught.value)) == (damping != FEW.damping)
        monkeypatch.undo()
        assert first.finish() == 0
    assert json.loads((target / "quantize_report.json").read_text())["options"]["damping"] == FEW.damping


def test_a_second_conversion_is_refused_before_it_reads(
    int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    with waiting(lambda progress: convert(int4, target, progress=progress)) as first:
        monkeypatch.setattr("qvl_runtime.convert.convert.Checkpoint", None)
        with pytest.raises(CheckpointError, match=rf"another process \({first.pid}\) is writing"):
            convert(int4, target, ConvertOptions(head="int8"))
        monkeypatch.undo()
        assert first.finish() == 0
    convert(int4, tmp_path / "alone")
    same_files(target, tmp_path / "alone")


def test_looking_at_a_lock_takes_nothing(tmp_path: Path) -> None:
    home = tmp_path / "out"
    PartialFolder(home, {"command": "a"}).check_idle()
    assert not list(tmp_path.iterdir())
    with PartialFolder(home, {"command": "a", "bits": 4}) as first:
        first.restart()
        with pytest.raises(CheckpointError, match=rf"\({os.getpid()}\).*with bits 4 instead of 8"):
            PartialFolder(home, {"command": "a", "bits": 8}).check_idle()
    for _ in range(3):
        PartialFolder(home, {"command": "a"}).check_idle()
    with PartialFolder(home, {"command": "a", "bits": 4}) as again:
        assert again.resumable


def test_a_conversion_does_not_remove_anothers_files(
    int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SHARDS, 1 << 16)
    target = tmp_path / "out"
    left_conversion(int4, target)
    before = sorted(path.name for path in (tmp_path / ".out.partial").rglob("*"))
    with pytest.raises(CheckpointError, match=r"other settings \(head 'keep' instead of 'int8'\).*remove the folder"):
        convert(int4, target, ConvertOptions(head="int8"))
    assert sorted(path.name for path in (tmp_path / ".out.partial").rglob("*")) == before
    convert(int4, target)
    convert(int4, tmp_path / "alone")
    same_files(target, tmp_path / "alone")


def test_what_was_made_of_another_source_is_replaced(
    int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SHARDS, 1 << 16)
    target = tmp_path / "out"
    left_conversion(int4, target)
    for path in int4.glob("*.safetensors"):
        os.utime(path, ns=(1, 1))
    convert(int4, target)
    restore(target, tmp_path / "back")
    same_files(int4, tmp_path / "back")


@pytest.mark.parametrize("damage", ["journal", "shard", "type"])
def test_damaged_journals_are_taken_up_where_they_are_whole(
    int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(SHARDS, 1 << 16)
    target, home = tmp_path / "out", tmp_path / ".out.partial"
    left_conversion(int4, target)
    lines = (home / "journal.jsonl").read_text().splitlines(keepends=True)
    if damage == "journal":
        (home / "journal.jsonl").write_bytes(lines[0].encode()[:-30] + b"\xff\xfe\n" + "".join(lines[1:]).encode())
    elif damage == "type":
        (home / "journal.jsonl").write_text(lines[0] + '{"shard": 3}\n[[]]\n')
    else:
        with next((home / "model").glob("*.safetensors")).open("r+b") as file:
            file.truncate(1000)
    convert(int4, target)
    convert(int4, tmp_path / "alone")
    same_files(target, tmp_path / "alone")


def test_refused_conversions_leave_nothing(
    raw: dict[str, Any], make_state: MakeState, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw["visual"]["width"] = 40
    source = write(raw, make_state(ModelConfig.from_dict(raw)))
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"rounding to 8 bits needs a multiple of 32"):
            convert(source, tmp_path / "out", ConvertOptions(vision="int8"))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="make room for"):
        convert(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_disk_that_fills_while_quantizing(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"

    def full(tensors: Any, path: Any, **more: Any) -> None:
        if "layer-00001" in str(path):
            raise RuntimeError("I/O error: No space left on device (os error 28)")
        save_file(tensors, path, **more)

    monkeypatch.setattr("qvl_runtime.quantize.job.save_file", full)
    with pytest.raises(CheckpointError, match=r"the disk is full at layer-00001.safetensors .* rerun the same command"):
        run(source, target)
    assert not list((tmp_path / ".out.partial").glob("*.part-*"))
    monkeypatch.undo()
    run(source, target)
    assert digest(target) == digest(whole)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_errors_of_a_disk(tmp_path: Path, code: int) -> None:
    def fails(path: Path) -> None:
        raise OSError(code, os.strerror(code))

    with pytest.raises(PermissionError if code == errno.EACCES else CheckpointError):
        replace_file(tmp_path / "x", fails)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["bytes", "empty", "no job", "job", "shape", "done", "layer", "no layer"])
def test_damaged_work_of_a_quantization(source: Path, left_quantization: Path, tmp_path: Path, damage: str) -> None:
    target, home = tmp_path / "out", Path(shutil.copytree(left_quantization, tmp_path / ".out.partial"))
    state, layer = home / "state.safetensors", home / "layer-00000.safetensors"
    x = load_file(state)["x"]
    error = [0, "attn.c_attn", 0.1, 0.1, 0.01, 1.0]
    job = {"no job": None, "job": "[[", "done": json.dumps({"done": 9, "errors": []})}
    if damage in ("layer", "no layer"):
        layer.write_bytes(layer.read_bytes()[:100]) if damage == "layer" else layer.unlink()
    elif damage in ("bytes", "empty"):
        state.write_bytes(state.read_bytes()[:-7] if damage == "bytes" else b"")
    elif damage == "shape":
        save_file({"x": x[:, 1:].contiguous()}, state, metadata={"job": json.dumps({"done": 1, "errors": [error]})})
    else:
        text = job[damage]
        save_file({"x": x}, state, metadata=None if text is None else {"job": text})
    with pytest.raises(CheckpointError, match=r"remove .*\.out\.partial to start again"):
        run(source, target)
    assert home.is_dir() and not target.exists()


def test_a_kill_releases_the_lock(int4: Path, tmp_path: Path) -> None:
    convert(int4, tmp_path / "converted")
    target = tmp_path / "back"
    with waiting(lambda progress: restore(tmp_path / "converted", target, progress)) as first:
        os.kill(first.pid, signal.SIGSTOP)
        with pytest.raises(CheckpointError, match=rf"another process \({first.pid}\)"):
            restore(tmp_path / "converted", target)
        first.kill()
    restore(tmp_path / "converted", target)
    same_files(int4, target)
