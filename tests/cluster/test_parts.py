"""The rows of a file and the folder of their answers: what is refused, and what a kill leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qvl_runtime.cluster import rows
from qvl_runtime.cluster.parts import Parts
from qvl_runtime.cluster.rows import chunks, survey
from qvl_runtime.errors import PromptError

pytestmark = pytest.mark.unit
JOB = {"format": 1, "rows": 3}


def answer(index: int) -> str:
    return json.dumps({"index": index, "id": None, "text": "x"})


def written(folder: Path) -> list[int]:
    """The indices of all answers in a folder."""
    return [json.loads(line)["index"] for path in sorted(folder.glob("part-*")) for line in path.open()]


def requests(path: Path, *records: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def test_each_row_is_written_once_over_several_runs(tmp_path: Path) -> None:
    for run in range(3):
        parts = Parts(tmp_path / "out", JOB)
        assert parts.done == set(range(run))
        assert parts.write(run, answer(run), run == 1) and not parts.write(0, answer(0), False)
        parts.close()
    assert written(tmp_path / "out") == [0, 1, 2]
    assert len(list((tmp_path / "out").glob("part-*"))) == 3


@pytest.mark.parametrize("cut", range(1, 30, 3))
def test_a_line_that_a_kill_cut_off_is_answered_again(tmp_path: Path, cut: int) -> None:
    parts = Parts(tmp_path, JOB)
    for index in range(2):
        parts.write(index, answer(index), False)
    parts.close()
    path = tmp_path / "part-00000.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    parts = Parts(tmp_path, JOB)
    assert parts.done == {0}
    parts.write(1, answer(1), False)
    parts.close()
    assert written(tmp_path) == [0, 1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("job.json", '{"format": 1, "rows": 4}', "holds answers of another job, whose rows is 4, not 3"),
        ("job.json", "no JSON", "holds answers of another job"),
        ("notes.txt", "mine", "is not empty and holds no job"),
    ],
)
def test_a_folder_of_something_else_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(PromptError, match=message):
        Parts(tmp_path, JOB)


def test_what_is_no_answer_is_refused(tmp_path: Path) -> None:
    Parts(tmp_path, JOB).close()
    for text, message in [
        ("hello\n", "which is no answer"),
        (f"{answer(0)}\n{answer(0)}\n", "a second time"),
        (f"{answer(0)}\nhello", "does not end with an answer"),
        ('{"index": true}\n', "which is no answer"),
    ]:
        (tmp_path / "part-00000.jsonl").write_text(text)
        with pytest.raises(PromptError, match=message):
            Parts(tmp_path, JOB)
    (tmp_path / "part-00000.jsonl").rename(tmp_path / "part-x.jsonl")
    with pytest.raises(PromptError, match="no part that this command wrote"):
        Parts(tmp_path, JOB)
    (tmp_path / "file").touch()
    with pytest.raises(PromptError, match="is a file; with --ray, answers go to a folder"):
        Parts(tmp_path / "file", JOB)


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    parts = Parts(tmp_path, JOB)
    with pytest.raises(PromptError, match="another process is writing"):
        Parts(tmp_path, JOB)
    parts.close()
    Parts(tmp_path, JOB).close()


def test_a_kill_before_the_job_is_named_leaves_a_folder_that_can_be_used(tmp_path: Path) -> None:
    (tmp_path / ".job.json.partial").write_text("{")
    Parts(tmp_path, JOB).close()


def test_double_ids_are_refused_with_both_lines(tmp_path: Path) -> None:
    path = requests(tmp_path / "in", {"id": "a"}, "", {"id": 1}, {"id": "1"}, {"id": "a"})
    with pytest.raises(PromptError, match=r"lines 1 and 5 of .* have the same id"):
        survey(path)
    assert survey(requests(path, {"id": 1}, {"id": "1"}, {}, {}, "no JSON", {"id": None})).rows == 6
    with pytest.raises(PromptError, match="holds no request"):
        survey(requests(path, "", " "))


def test_rows_about_a_picture_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = requests(tmp_path / "in", *({"prompt": "?", "images": [f"{i % 7}.png"]} for i in range(70)), "no JSON")
    made = list(chunks(path, {0, 1}))
    assert sorted(row.position for chunk in made for row in chunk) == list(range(2, 71))
    for picture in range(7):
        assert sum(any(row.position % 7 == picture and row.position < 70 for row in chunk) for chunk in made) == 1
    monkeypatch.setattr(rows, "WINDOW_ROWS", 10)
    assert sorted(row.position for chunk in chunks(path, ()) for row in chunk) == list(range(71))
    assert max(map(len, chunks(path, ()))) <= rows.LARGEST_CHUNK
