"""Gold answers score exactly 100 in every task on nano's exported scenes, a constant answer its hand-worked value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from qvl_runtime.errors import QVLError
from qvl_runtime.evaluate.asking import PICTURES, Numbered, Reply, interleaved
from qvl_runtime.evaluate.loading import load
from qvl_runtime.evaluate.prompts import Question
from qvl_runtime.evaluate.report import TaskReport, report_task
from qvl_runtime.evaluate.runner import RunOptions, run_task
from qvl_runtime.evaluate.samples import LETTERS, Sample
from qvl_runtime.evaluate.tasks.table import TASKS

pytestmark = pytest.mark.unit


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nano's scenes as every data set."""
    from tools.nano.datasets import write_datasets
    from tools.nano.scenes import check_fonts

    try:
        check_fonts()
    except SystemExit as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("scenes") / "data"
    write_datasets(folder, 28)  # two of each subtask of MME
    return folder


class Fixed:
    """Answers by a function of the sample."""

    chat_format = "chatml"

    def __init__(self, samples: list[Sample], answer: Callable[[Sample], str]) -> None:
        self._samples, self._answer = samples, answer

    def identity(self) -> Mapping[str, Any]:
        return {"checkpoint": "none"}

    def answers(self, questions: Iterable[Numbered]) -> Iterator[tuple[int, Reply | QVLError]]:
        for number, _ in questions:
            yield number, Reply(self._answer(self._samples[number]))


def gold(sample: Sample) -> str:
    """The right answer as a model would write it."""
    reference = sample.references[0]
    if sample.options:
        return LETTERS[reference]
    if "width" in sample.facts:
        corners = [
            value / sample.facts[side] * 999 for value, side in zip(reference, ("width", "height") * 2, strict=True)
        ]
        return "({:.0f},{:.0f}),({:.0f},{:.0f})".format(*corners)
    return str(reference["answer"] if isinstance(reference, dict) else reference)


def people(sample: Sample) -> str:
    """What most people answer."""
    answers = [record["answer"] for record in sample.references]
    return str(max(answers, key=answers.count))


def scored(task: str, data: Path, out: Path, answer: Callable[[Sample], str]) -> TaskReport:
    samples = load(TASKS[task], data).samples
    run = run_task(TASKS[task], Fixed(samples, answer), RunOptions(data), out)
    return report_task(run, "chatml")


PEOPLE = ("vqav2_val", "okvqa_val", "vizwiz_val", "textvqa_val")
OTHERS = (
    "gqa_testdev",
    "ai2diagram",
    "docvqa_val",
    "chartqa",
    "ocrvqa_test",
    "scienceqa_test_img",
    "mmbench_dev_20230712",
    "seed_bench",
    "refcoco_val",
    "refcoco+_val",
    "refcocog_test",
    "scenes",
    "scenes_zh",
)


@pytest.mark.parametrize("task", [*PEOPLE, *OTHERS])
def test_gold_answers_score_100(task: str, scenes: Path, tmp_path: Path) -> None:
    report = scored(task, scenes, tmp_path, people if task in PEOPLE else gold)
    assert {score.value for score in report.scores} == {100.0}
    assert {(score.low, score.high) for score in report.scores} == {(100.0, 100.0)}


def test_gold_answers_of_mme_score_all_points(scenes: Path, tmp_path: Path) -> None:
    scores = {score.name: score.value for score in scored("mme", scenes, tmp_path, gold).scores}
    assert (scores.pop("perception"), scores.pop("cognition")) == (2000.0, 800.0)
    assert len(scores) == 14
    assert set(scores.values()) == {200.0}


def test_always_yes_scores_half_of_mme_and_nothing_for_pictures(scenes: Path, tmp_path: Path) -> None:
    scores = {score.name: score.value for score in scored("mme", scenes, tmp_path, lambda _: "Yes").scores}
    # One of the two questions about each picture is right, so that no picture has both: 50 + 0 for each subtask.
    assert (scores["perception"], scores["cognition"], scores["OCR"]) == (500.0, 200.0, 50.0)


@pytest.mark.parametrize("task", PEOPLE)
def test_a_constant_answer_scores_what_people_gave(task: str, scenes: Path, tmp_path: Path) -> None:
    # "unknown" is one of the ten answers to each question: nine times 1/3, and 0 when it is left out.
    assert scored(task, scenes, tmp_path, lambda _: "unknown").scores[0].value == pytest.approx(30.0)


def test_a_constant_letter_is_right_as_often_as_it_is_the_answer(scenes: Path, tmp_path: Path) -> None:
    samples = load(TASKS["scienceqa_test_img"], scenes).samples
    share = sum(sample.references == (0,) for sample in samples) / len(samples)
    assert scored("scienceqa_test_img", scenes, tmp_path, lambda _: "A").scores[0].value == pytest.approx(100 * share)


def test_a_constant_letter_is_never_right_in_all_rotations(scenes: Path, tmp_path: Path) -> None:
    scores = {s.name: s.value for s in scored("mmbench_dev_20230712", scenes, tmp_path, lambda _: "A").scores}
    assert scores == {"all rotations": 0.0, "one rotation": 25.0}


def test_a_constant_box_scores_the_boxes_that_it_covers(scenes: Path, tmp_path: Path) -> None:
    samples = load(TASKS["refcoco_val"], scenes).samples
    # The whole picture overlaps a box by the box's share of it, which is below half for all of nano's things.
    assert all((s.references[0][2] - s.references[0][0]) / s.facts["width"] < 0.7 for s in samples)
    assert scored("refcoco_val", scenes, tmp_path, lambda _: "(0,0),(999,999)").scores[0].value == 0.0


def test_captions_score_as_in_the_tool_and_gold_ones_highest(scenes: Path, tmp_path: Path) -> None:
    best = scored("flickr", scenes, tmp_path / "a", gold).scores[0].value
    constant = scored("flickr", scenes, tmp_path / "b", lambda _: "a red circle").scores[0].value
    assert best > 300 > constant > 0


def test_secret_answers_give_a_file_and_no_score(scenes: Path, tmp_path: Path) -> None:
    report = scored("vqav2_testdev", scenes, tmp_path, lambda _: "red")
    assert (report.scores, "secret" in report.notes[0]) == ([], True)


def test_questions_about_one_picture_are_not_asked_at_once() -> None:
    def question(number: int, picture: str) -> Numbered:
        return number, Question("", raw=True, picture=picture)

    asked = [question(number, f"p{number // 3}") for number in range(3 * PICTURES + 6)]
    order = [number for number, _ in interleaved(asked)]
    assert sorted(order) == [number for number, _ in asked]
    assert order[:PICTURES] == [3 * picture for picture in range(PICTURES)]
    assert order[3 * PICTURES :] == [3 * PICTURES + at for at in (0, 3, 1, 4, 2, 5)]
