"""`qvl finetune`, `merge` and `plan --finetune`: real short runs, Ctrl-C and resuming, each bad input in a line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from qvl_runtime.engine.engine import NANO
from tests.fakes import qvl
from tests.finetune.test_trainer import data

__all__ = ["data"]
pytestmark = pytest.mark.cpu
QUICK = ("--epochs", "1", "--accumulate", "3", "--no-pack", "--rate", "0.01", "--rank", "4", "--device", "cpu")


def finetune(*arguments: object) -> Result:
    return qvl("finetune", *arguments, *QUICK)


def one_line(result: Result, words: str) -> None:
    assert result.exit_code == 2 and words in " ".join(result.stderr.split()), result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("command", ["finetune", "merge"])
def test_help_explains_itself_with_examples(command: str) -> None:
    result = qvl(command, "--help")
    assert result.exit_code == 0 and f"qvl {command} Qwen/Qwen-VL-Chat" in result.stdout
    assert "│ --" in result.stdout


def test_two_steps_of_lora_and_their_files(source: Path, data: Path, tmp_path: Path) -> None:
    result = finetune(source, data, tmp_path / "out", "--held-out", data, "--json")
    assert result.exit_code == 0, result.stderr
    last = json.loads(result.stdout)
    assert last["step"] == 2 and {"loss", "held_out_loss", "exact"} <= set(last)
    assert "6 conversations" in result.stderr and "method lora, 1 epochs, 2 steps" in result.stderr
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "log.jsonl"} <= files
    again = finetune(source, data, tmp_path / "out")
    one_line(again, "exists already")


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_the_other_methods_and_quiet(method: str, source: Path, whole: Path, data: Path, tmp_path: Path) -> None:
    model = whole if method == "qlora" else source
    result = finetune(model, data, tmp_path / "out", "--method", method, "--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    name = "adapter_model.safetensors" if method == "qlora" else "model.safetensors"
    assert (tmp_path / "out" / name).is_file()


def test_a_dry_run_writes_nothing(source: Path, data: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    result = finetune(source, data, tmp_path / "out", "--dry-run")
    assert result.exit_code == 0 and "2 steps" in result.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("able", "dtype", "warns"), [(False, "auto", 1), (False, "float32", 0), (True, "auto", 0)])
def test_slow_products_of_bfloat16_are_told(
    able: bool, dtype: str, warns: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qvl_runtime.host.has_bfloat16_products", lambda: able)
    result = finetune(NANO, data, tmp_path / "out", "--dry-run", "--dtype", dtype)
    assert result.exit_code == 0 and result.stderr.count("--dtype float32") == warns, result.stderr


def test_conversations_to_keep_are_counted_and_watched(source: Path, data: Path, tmp_path: Path) -> None:
    result = finetune(source, data, tmp_path / "out", "--keep", data, "--json")
    assert result.exit_code == 0, result.stderr
    assert "6 conversations of" in result.stderr and "6 conversations to keep" in result.stderr
    assert "tokens to keep: " in result.stderr and "KiB in host memory" in result.stderr
    assert json.loads(result.stdout)["divergence"] >= 0
    one_line(finetune(source, data, tmp_path / "second", "--keep", tmp_path / "no.json"), "no.json")
    one_line(finetune(source, data, tmp_path / "second", "--keep", data, "--keep-weight", "0"), "--keep-weight is 0")


def test_every_fault_of_the_data_is_listed_before_the_error(source: Path, data: Path, tmp_path: Path) -> None:
    records = json.loads(data.read_text())
    records[1]["conversations"][0]["value"] = "<img>gone.png</img>"
    records[4]["conversations"][1]["from"] = "robot"
    data.write_text(json.dumps(records))
    result = finetune(source, data, tmp_path / "out")
    one_line(result, "2 faulty records")
    assert "record 2" in result.stderr and "gone.png" in result.stderr and "robot" in result.stderr
    assert not (tmp_path / "out").exists()
    skipped = finetune(source, data, tmp_path / "out", "--skip-bad")
    assert skipped.exit_code == 0 and "left out: 2 faulty" in skipped.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "dora"], "method is 'dora'"),
        (["--method", "qlora"], "not quantized: use 'lora'"),
        (["--labels", "all"], "labels is 'all'"),
        (["--warmup", "2"], "warmup is 2.0"),
        (["--targets", ""], "target_modules is empty"),
        (["--targets", "q_proj"], "match no linear"),
        (["--train", "ears", "--method", "full"], "parts has 'ears'"),
        (["--modules-to-save", "visual"], "--modules-to-save has 'visual'"),
        (["--sharding", "data"], "start it by torchrun"),
        (["--deepspeed", "no.json"], "no.json does not exist; expected a DeepSpeed configuration"),
        (["--schedule", "linear"], "schedule is 'linear'"),
        (["--held-out", "no.json"], "no.json"),
        (["--max-length", "20"], "nothing to train on"),
        (["--device", "tpu"], "tpu"),
        (["--epochs", "9" * 20], "epochs is 99999999999999999999; supported are values up to 10,000"),
    ],
)
def test_a_bad_option_is_one_line(
    arguments: list[str], words: str, source: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    one_line(qvl("finetune", source, data, tmp_path / "out", *QUICK, *arguments), words)
    assert not (tmp_path / "out").exists()


def test_missing_files_are_named(source: Path, data: Path, tmp_path: Path) -> None:
    one_line(finetune(source, tmp_path / "no.json", tmp_path / "out"), "no.json")
    one_line(finetune(tmp_path / "no" / "model" / "here", data, tmp_path / "out"), "neither a folder nor a hub id")
    one_line(qvl("merge", source, tmp_path / "none", tmp_path / "merged"), "none")


# A step of the child waits until its parent has sent the signal.
STOPPED = """
import sys, time
from qvl_runtime.cli.app import main
from qvl_runtime.finetune.trainer import Trainer
real = Trainer._take_step
def slow(self, rows):
    print("step", flush=True)
    if self.step == 1:
        sys.stdin.readline()
    return real(self, rows)
Trainer._take_step = slow
sys.argv = ["qvl", *sys.argv[1:]]
main()
"""


def stopped_run(arguments: list[Any], *signals: signal.Signals) -> tuple[int, str]:
    """Run, send the signals in the second step, and return exit code and standard error."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", STOPPED, "finetune", *map(str, arguments), *QUICK, "--accumulate", "1"]
    with subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["step\n"] * 2
        for number in signals:
            process.send_signal(number)
        _, errors = process.communicate("\n", timeout=60)
        return process.returncode, errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_the_step_and_the_same_command_resumes(
    number: signal.Signals, source: Path, data: Path, tmp_path: Path
) -> None:
    code, errors = stopped_run([source, data, tmp_path / "out"], number)
    assert code == 130, errors
    assert "stopped after step 2 of 6" in errors and errors.endswith("interrupted\n")
    assert [path.name for path in (tmp_path / ".out.partial" / "states").iterdir()] == ["step-00000002"]
    resumed = finetune(source, data, tmp_path / "out", "--accumulate", "1")
    assert resumed.exit_code == 2, "other options"
    for name in ("out", "whole"):
        result = qvl("finetune", source, data, tmp_path / name, *QUICK, "--accumulate", "1")
        assert result.exit_code == 0 and ("2 of them done" in result.stderr) == (name == "out")
    parts, whole = (tmp_path / name / "adapter_model.safetensors" for name in ("out", "whole"))
    assert parts.read_bytes() == whole.read_bytes()


def test_merge_says_what_it_changed_and_refuses_what_does_not_fit(
    source: Path, whole: Path, data: Path, tmp_path: Path
) -> None:
    assert finetune(source, data, tmp_path / "own").exit_code == 0
    result = qvl("merge", source, tmp_path / "own", tmp_path / "merged", "--calibration", data, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert "8 linears changed" in result.stderr and "merged, from the base with the adapter: KL" in result.stderr
    as_json = ("--calibration", data, "--json", "--quiet")
    report = json.loads(qvl("merge", source, tmp_path / "own", tmp_path / "second", *as_json).stdout)
    assert report["linears"] == 8 and report["merged"]["kl"] < 1e-3
    one_line(qvl("merge", source, tmp_path / "own", tmp_path / "merged"), "exists already")
    one_line(qvl("merge", whole, tmp_path / "own", tmp_path / "int4"), "--requantize")
    one_line(qvl("merge", source, tmp_path / "own", tmp_path / "int4", "--requantize"), "without --requantize")
    one_line(qvl("merge", NANO, tmp_path / "own", tmp_path / "other"), "other sizes")


def test_merge_onto_int4_by_quantizing_again(whole: Path, data: Path, tmp_path: Path) -> None:
    assert finetune(whole, data, tmp_path / "own", "--method", "qlora").exit_code == 0
    arguments = ("--requantize", "--calibration", data, "--samples", "2", "--json")
    result = qvl("merge", whole, tmp_path / "own", tmp_path / "int4", *arguments)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert set(report) == {"base without the adapter", "requantized"}
    assert (tmp_path / "int4" / "model.safetensors").is_file()


def test_plan_for_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvl_runtime.cli.plan.TRAINING_LENGTHS", (128, 256))
    table = qvl("plan", NANO, "--finetune", "full")
    assert table.exit_code == 0 and "computed: the peak" in table.stdout, table.stderr
    rows = json.loads(qvl("plan", NANO, "--finetune", "lora", "--json").stdout)
    assert list(rows) == ["128", "256"] and rows["128"]["total"] < rows["256"]["total"]
    assert all(row["total"] == row["weights"] + row["optimizer"] + row["step"] for row in rows.values())


def test_plan_refuses_what_training_does() -> None:
    one_line(qvl("plan", NANO, "--finetune", "dora"), "method is 'dora'")
    one_line(qvl("plan", NANO, "--finetune", "qlora"), "not quantized: use 'lora'")
