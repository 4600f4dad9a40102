"""Files to submit, in the form that each data set's authors document."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from qvl_runtime.evaluate.loading import load
from qvl_runtime.evaluate.scoring import Answer, Context
from qvl_runtime.evaluate.submission import write_submission
from qvl_runtime.evaluate.tasks.table import TASKS
from tests.evaluate.data_cases import CASES
from tests.evaluate.data_files import write

pytestmark = pytest.mark.unit


def submitted(task: str, texts: list[str], folder: Path) -> Path:
    """The file of a task's hand-made data set, answered with these texts; an empty one is an error."""
    data = write(folder / "data", next(case for case in CASES if case.task == task))
    samples = load(TASKS[task], data).samples
    answers = [Answer(i, samples[i], text, None if text else "failed") for i, text in enumerate(texts)]
    form = TASKS[task].submission
    assert form is not None
    (path,) = write_submission(form, answers, Context(), folder / "out")
    return path


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("(100,200),(500,999)", [2, 2, 10, 10]),  # of 20 x 10 pixels
        ("(nan,200),(500,1e999)", [0, 0, 0, 0]),
        ("no box", [0, 0, 0, 0]),
    ],
)
def test_grit_wants_whole_pixels(text: str, box: list[int], tmp_path: Path) -> None:
    path = submitted("grit_refexp", [text, ""], tmp_path)
    assert path == tmp_path / "out/submission/refexp.json"
    first = {"example_id": "r1", "bboxes": [box], "confidence": 1.0}
    second = {"example_id": "r2", "bboxes": [[0, 0, 0, 0]], "confidence": 1.0}
    assert json.loads(path.read_text()) == [first, second]
    assert "." not in path.read_text().replace("1.0", "")


def test_touchstone_wants_its_own_columns_and_the_response(tmp_path: Path) -> None:
    path = submitted("touchstone_en", ['A "dog"\tand\na cat', "No."], tmp_path)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    columns = ["index", "question", "human_annotation", "gpt4_ha_answer", "category", "task_name", "response"]
    assert list(rows[0]) == columns
    assert [row["response"] for row in rows] == ['A "dog"\tand\na cat', "No."]
