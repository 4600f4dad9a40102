"""`qvl evaluate`: its output, its exit codes, and each bad input in one line."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from qvl_runtime.cli.app import app
from tests.evaluate.data_cases import CASES
from tests.evaluate.data_files import png, write

pytestmark = pytest.mark.cpu


def qvl(*arguments: str) -> Result:
    options = ["--max-model-len", "1024"] if arguments else []
    return CliRunner().invoke(app, ["evaluate", *arguments, *options], env={"NO_COLOR": "1", "COLUMNS": "200"})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three data sets of two samples each."""
    for case in CASES:
        if case.task in ("refcoco_val", "gqa_testdev", "docvqa_test") and not case.name:
            write(tmp_path / "data", case)
    return tmp_path / "data"


def test_a_run_its_files_and_its_comparison(data: Path, tmp_path: Path) -> None:
    tasks = ("nano", "refcoco_val", "gqa_testdev", "docvqa_test", "--data", str(data))
    plots = ["--plots"] if find_spec("matplotlib") else []
    result = qvl(*tasks, "--out", str(tmp_path / "a"), *plots)
    assert result.exit_code == 0, result.stderr
    assert "RefCOCO (val)" in result.stdout and "88.55" in result.stdout
    assert "docvqa_test: the answers of this split are secret" in result.stderr
    assert "6 samples answered" in result.stderr
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert [task["task"] for task in report["tasks"]] == ["refcoco_val", "gqa_testdev", "docvqa_test"]
    assert len(report["run"]["checkpoint"]) == 64
    assert json.loads((tmp_path / "a/docvqa_test/submission.json").read_text())[0]["questionId"] == 11
    assert not plots or (tmp_path / "a" / "refcoco_val.png").stat().st_size > 1000

    other = (*tasks, "--out", str(tmp_path / "b"), "--against", str(tmp_path / "a"), "--precision", "fast", "--json")
    result = qvl(*other)
    assert result.exit_code == 0, result.stderr
    differences = json.loads(result.stdout)["differences"]
    assert {entry["task"] for entry in differences} == {"refcoco_val", "gqa_testdev"}
    assert all(entry["of"] == 2 for entry in differences)
    again = json.loads(qvl(*other).stdout)
    assert again["run"]["samples answered in this run"] == 0
    assert again["differences"] == differences


def test_an_unreadable_picture_gives_exit_code_3(data: Path, tmp_path: Path) -> None:
    (data / "coco/1.png").write_bytes(png()[:30])
    result = qvl("nano", "refcoco_val", "--data", str(data), "--out", str(tmp_path / "a"))
    assert result.exit_code == 3
    assert "1 samples could not be answered" in result.stderr and "of those answered" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["nano"], "no task is given"),
        (["nano", "vqav3"], "there is no task 'vqav3'"),
        (["nano", "mme"], "lacks the files of mme; expected mme/Your_Results/existence.txt"),
        (["nano", "refcoco_val", "--scale", "500"], "scale is 500; supported are 999"),
        (["nano", "refcoco_val", "--limit", "0"], "limit is 0"),
        (["nano", "refcoco_val", "--style", "other"], "style is 'other'"),
        (["nano", "refcoco_val", "--prompt", "{text}"], "has the field {text}"),
        (["nano", "refcoco_val", "--shots", "2"], "no training file"),
        (["nano", "refcoco_val", "--url", "localhost"], "expected an address such as"),
        (["no/folder/here", "refcoco_val"], "neither a folder nor a hub id"),
    ],
)
def test_a_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], fault: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = qvl(*arguments, "--data", str(data))
    assert result.exit_code == 2 and fault in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "evaluation").exists()


def test_an_incomplete_folder_and_other_settings_are_refused(data: Path, tmp_path: Path) -> None:
    run = ("nano", "refcoco_val", "--data", str(data), "--out", str(tmp_path / "a"))
    assert qvl(*run, "--limit", "1").exit_code == 0
    other = qvl(*run, "--style", "chat")
    assert other.exit_code == 2 and "holds answers of a run with other settings" in other.stderr
    (data / "coco/0.png").unlink()
    result = qvl(*run)
    assert result.exit_code == 2 and "1 of the 2 images of refcoco_val are missing" in result.stderr
    assert "--allow-missing" in result.stderr
    assert qvl(*run, "--allow-missing").exit_code == 0  # the first sample has its answer; the second its picture


def test_the_list_names_files_and_sources() -> None:
    result = CliRunner().invoke(app, ["evaluate", "--list"], env={"NO_COLOR": "1"})
    assert result.exit_code == 0
    assert "refcoco/refcoco_val.jsonl" in result.stdout and "https://vizwiz.org" in result.stdout
    assert "captions: flickr nocaps" in result.stdout
