"""Runs that stop and resume, samples that cannot be read, and what a run refuses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qvl_runtime import Engine
from qvl_runtime.errors import ConfigError, DataError, PromptError
from qvl_runtime.evaluate.asking import EngineAsker
from qvl_runtime.evaluate.prompts import Style
from qvl_runtime.evaluate.records import Records
from qvl_runtime.evaluate.report import report_task
from qvl_runtime.evaluate.runner import RECORDS, RunOptions, run_task
from qvl_runtime.evaluate.session import evaluate
from qvl_runtime.evaluate.tasks.table import TASKS
from tests.evaluate.data_cases import CASES
from tests.evaluate.data_files import REFCOCO, Files, png, write
from tests.evaluate.killed import Slow

pytestmark = pytest.mark.cpu
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def asker() -> EngineAsker:
    """Nano, which knows nothing of these pictures but answers."""
    return EngineAsker(Engine(progress=False, max_model_len=1024), "nano")


def expressions(root: Path, count: int) -> Path:
    lines = [{**REFCOCO[0], "image": f"data/coco/{i % 3}.png", "sent": f"thing {i}"} for i in range(count)]
    images = tuple(f"coco/{i}.png" for i in range(3))
    return write(root / "data", Files("refcoco_val", {"refcoco/refcoco_val.jsonl": lines}, images, (), (), ""))


def entries(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][1:]


def test_kill_9_loses_and_doubles_nothing(tmp_path: Path) -> None:
    data, out = expressions(tmp_path, 60), tmp_path / "out"
    command = [sys.executable, "-m", "tests.evaluate.killed", str(data), str(out)]
    process = subprocess.Popen(command, cwd=ROOT)
    while not (out / RECORDS).exists() or (out / RECORDS).read_bytes().count(b"\n") < 20:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    content = (out / RECORDS).read_bytes()
    kept = content[: content.rfind(b"\n") + 1]
    run = run_task(TASKS["refcoco_val"], Slow(), RunOptions(data), out)
    assert (out / RECORDS).read_bytes().startswith(kept)
    assert run.asked == 60 - (kept.count(b"\n") - 1)
    found = entries(out / RECORDS)
    assert [entry["number"] for entry in found] == list(range(60))
    assert all(entry["text"] == f"answer {entry['number']}" for entry in found)


def test_a_line_that_is_not_whole_is_cut_off_and_asked_again(tmp_path: Path) -> None:
    data, out = expressions(tmp_path, 4), tmp_path / "out"
    options = RunOptions(data)
    run_task(TASKS["refcoco_val"], Slow(), options, out)
    path = out / RECORDS
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    run = run_task(TASKS["refcoco_val"], Slow(), options, out)
    assert (run.asked, path.read_bytes()) == (1, whole)


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    data, out = expressions(tmp_path, 4), tmp_path / "out"
    run_task(TASKS["refcoco_val"], Slow(), RunOptions(data), out)
    with pytest.raises(DataError, match="style 'original' there and 'chat' now"):
        run_task(TASKS["refcoco_val"], Slow(), RunOptions(data, Style("chat")), out)
    (data / "refcoco/refcoco_val.jsonl").open("a").write("\n")
    with pytest.raises(DataError, match="files"):
        run_task(TASKS["refcoco_val"], Slow(), RunOptions(data), out)


def test_a_higher_limit_continues(tmp_path: Path) -> None:
    data, out = expressions(tmp_path, 6), tmp_path / "out"
    first = run_task(TASKS["refcoco_val"], Slow(), RunOptions(data, limit=2), out)
    second = run_task(TASKS["refcoco_val"], Slow(), RunOptions(data), out)
    assert (first.asked, second.asked, len(second.answers)) == (2, 4, 6)
    assert "only the first 2 of 6" in report_task(first, "raw").notes[0]


def test_two_runs_at_once_are_kept_apart(tmp_path: Path) -> None:
    with Records(tmp_path / "a", {"x": 1}), pytest.raises(DataError, match="another process is writing"):
        Records(tmp_path / "a", {"x": 1})


@pytest.mark.parametrize("content", ["", "\n", "[]\n", '{"settings": 3}\n', '{"settings": {"x": 1}}\n{"no": 1}\n'])
def test_a_file_that_is_no_run(content: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_text(content)
    if not content:
        Records(tmp_path / "a", {"x": 1}).__exit__(None, None, None)
        return
    with pytest.raises(DataError):
        Records(tmp_path / "a", {"x": 1})


def test_an_unreadable_picture_is_an_error_of_its_samples(asker: EngineAsker, tmp_path: Path) -> None:
    data = expressions(tmp_path, 6)
    (data / "coco/1.png").write_bytes(png()[:40])
    run = run_task(TASKS["refcoco_val"], asker, RunOptions(data), tmp_path / "out")
    assert [answer.number for answer in run.answers if answer.error] == [1, 4]
    report = report_task(run, "chatml")
    assert report.errors == 2
    score = report.scores[0]
    assert score.good is not None
    assert score.value == pytest.approx(score.good * 4 / 6)
    assert any("2 samples could not be answered" in note for note in report.notes)


@pytest.mark.parametrize("name", ["original", "chat"])
@pytest.mark.parametrize(
    "task", ["vqav2_testdev", "refcoco_val", "scienceqa_test_img", "seed_bench", "flickr", "mme", "touchstone_en"]
)
def test_every_kind_of_task_is_asked(task: str, name: str, asker: EngineAsker, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.task == task)
    data = write(tmp_path / "data", case)
    options = RunOptions(data, Style(name), max_tokens=None if task != "mme" else 8)
    evaluation = evaluate([TASKS[task]], asker, options, tmp_path / "out", {"model": "nano"})
    report = evaluation.reports[0]
    assert (report.errors, len(report.run.answers)) == (0, len(case.ids))
    assert {answer.text for answer in report.run.answers} <= set("ABCDE") or task not in (
        "scienceqa_test_img",
        "seed_bench",
    )
    scored = [json.loads(line) for line in (tmp_path / "out" / task / "scored.jsonl").read_text().splitlines()]
    assert [line["id"] for line in scored] == list(case.ids)
    assert all(len(line["prompt"]) == 64 for line in scored)
    assert TASKS[task].submission is None or list((tmp_path / "out" / task).glob("submission*"))
    page = (tmp_path / "out" / "report.md").read_text()
    assert TASKS[task].title in page


def test_a_part_of_a_set_of_captions_has_a_score_that_compares_with_nothing(asker: EngineAsker, tmp_path: Path) -> None:
    data = write(tmp_path / "data", CASES[0])
    run = run_task(TASKS["flickr"], asker, RunOptions(data, limit=1), tmp_path / "out")
    report = report_task(run, "chatml")
    assert len(report.scores) == 1
    assert any("not comparable: the first 1 of 2" in note for note in report.notes), report.notes


def test_min_and_max_tokens_hold(asker: EngineAsker, tmp_path: Path) -> None:
    run = run_task(TASKS["flickr"], asker, RunOptions(write(tmp_path / "data", CASES[0])), tmp_path / "out")
    tokens = [entry["tokens"] for entry in entries(tmp_path / "out" / RECORDS)]
    assert all(8 <= int(str(count)) <= 30 for count in tokens)
    assert run.tokens == sum(int(str(count)) for count in tokens)


def test_examples_precede_the_question(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.task == "gqa_testdev" and not case.name)
    lines = case.files["gqa/testdev_balanced.jsonl"]
    data = write(tmp_path / "data", case._replace(files={**case.files, "gqa/train.jsonl": lines * 3}))
    from qvl_runtime.evaluate.loading import load

    loaded = load(TASKS["gqa_testdev"], data, shots=2)
    question = Style(shots=2).ask(loaded.samples[0], TASKS["gqa_testdev"].form, (1, 10), loaded.examples[0])
    first, second, last = question.prompt.split(" Answer:", 2)[0], question.prompt, question.prompt[-30:]
    assert first.startswith("<img>")
    assert second.count("</img>") == 3
    assert last.endswith("What color? Answer:")
    with pytest.raises(PromptError, match="shots is 9"):
        load(TASKS["gqa_testdev"], data, shots=9)
    with pytest.raises(DataError, match="no training file"):
        load(TASKS["refcoco_val"], expressions(tmp_path / "r", 2), shots=1)


@pytest.mark.parametrize(
    "style", [{"name": "other"}, {"template": "{nothing}"}, {"name": "chat", "shots": 2}, {"shots": -1}]
)
def test_styles_that_do_not_exist(style: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Style(**style)


def test_a_run_that_cannot_be_compared_is_refused_before_it_asks(tmp_path: Path) -> None:
    data = expressions(tmp_path, 4)
    for folder, style in (("a", "original"), ("b", "chat")):
        evaluate([TASKS["refcoco_val"]], Slow(), RunOptions(data, Style(style), limit=2), tmp_path / folder, {})
    with pytest.raises(DataError, match="prompt"):
        evaluate([TASKS["refcoco_val"]], Slow(), RunOptions(data), tmp_path / "c", {}, against=tmp_path / "b")
    with pytest.raises(DataError, match="does not exist"):
        evaluate([TASKS["refcoco_val"]], Slow(), RunOptions(data), tmp_path / "c", {}, against=tmp_path / "none")
    assert not (tmp_path / "c").exists()
    found = evaluate([TASKS["refcoco_val"]], Slow(), RunOptions(data), tmp_path / "c", {}, against=tmp_path / "a")
    assert [(d.there, d.here, d.same, d.of) for d in found.differences] == [(0.0, 0.0, 2, 2)]


def test_a_base_model_asked_in_chat_turns_is_noted(tmp_path: Path) -> None:
    data = write(tmp_path / "data", next(case for case in CASES if case.task == "mme"))
    run = run_task(TASKS["mme"], Slow(), RunOptions(data), tmp_path / "out")
    assert "base model" in report_task(run, "raw").notes[0]
    assert report_task(run, "chatml").notes == []
