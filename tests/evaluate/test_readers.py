"""Every data set's reader on a hand-made data set of two samples in its layout, whole and broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qvl_runtime.errors import MAX_MESSAGE, ConfigError, DataError
from qvl_runtime.evaluate.loading import load
from qvl_runtime.evaluate.readers.folder import DataFolder
from qvl_runtime.evaluate.tasks.table import GROUPS, TASKS, chosen
from tests.evaluate.data_cases import CASES
from tests.evaluate.data_files import Files, png, write

pytestmark = pytest.mark.unit
each = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.task}-{case.name}".rstrip("-"))


@each
def test_two_samples_are_read(case: Files, tmp_path: Path) -> None:
    loaded = load(TASKS[case.task], write(tmp_path / "data", case))
    assert tuple(sample.id for sample in loaded.samples) == case.ids
    assert tuple(sample.references for sample in loaded.samples) == case.references
    paths = {path for sample in loaded.samples for path in sample.images if not path.startswith("data:")}
    assert paths == {str(tmp_path / "data" / name) for name in case.images}
    assert sorted(loaded.files) == sorted(case.files)
    assert all(sample.question or TASKS[case.task].name in ("flickr", "nocaps") for sample in loaded.samples)


@each
def test_a_missing_file_is_named_with_the_layout(case: Files, tmp_path: Path) -> None:
    root = write(tmp_path / "data", case)
    lost = sorted(case.files)[-1]
    (root / lost).unlink()
    if case.name == "release":
        (root / lost).parent.rmdir() if not any((root / lost).parent.iterdir()) else None
    with pytest.raises(DataError) as error:
        load(TASKS[case.task], root)
    assert len(str(error.value)) <= MAX_MESSAGE
    named = lost.rsplit("/", 1)[0] if case.name == "release" else TASKS[case.task].layouts[0].files[0]
    assert named in str(error.value)


@each
def test_a_broken_file_is_named_with_its_place(case: Files, tmp_path: Path) -> None:
    root = write(tmp_path / "data", case)
    path = root / next(iter(case.files))
    text = path.read_text(encoding="utf-8")
    cut = len(text) // 2 - 5 if path.suffix != ".tsv" else text.index("\n") + 12  # within a line, before its image
    path.write_text(text[:cut] + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=path.name.replace("+", r"\+")):
        load(TASKS[case.task], root)


@pytest.mark.parametrize("case", [c for c in CASES if c.required], ids=lambda case: f"{case.task}-{case.name}")
def test_a_missing_value_is_named(case: Files, tmp_path: Path) -> None:
    root = write(tmp_path / "data", case)
    path = root / next(iter(case.files))
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        first, *others = text.splitlines()
        content = json.loads(first)
        del content[case.required]
        text = "\n".join([json.dumps(content), *others])
    elif path.suffix == ".tsv":
        text = text.replace(case.required, "other", 1)
    else:
        content = json.loads(text)
        content[int(case.required) if case.required == "0" else case.required] = 7
        text = json.dumps(content)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=path.name.replace("+", r"\+")):
        load(TASKS[case.task], root)


@pytest.mark.parametrize("case", [c for c in CASES if c.images], ids=lambda case: f"{case.task}-{case.name}")
def test_missing_images_are_counted_and_named_or_allowed(case: Files, tmp_path: Path) -> None:
    root = write(tmp_path / "data", case)
    (root / case.images[0]).unlink()
    if case.name == "official" and case.task == "seed_bench":
        return  # without its first frame a video's frames are looked for under another number
    with pytest.raises(DataError, match=r"1 of the \d+ images"):
        load(TASKS[case.task], root)
    assert len(load(TASKS[case.task], root, allow_missing=True).samples) == len(case.ids)


def test_there_is_a_case_for_every_reader() -> None:
    read = {case.task for case in CASES}
    alike = {"refcoco", "refcoco+", "refcocog", "touchstone", "scenes", "mmbench", "seed", "chartqa", "ocrvqa"}
    assert all(name in read or any(name.startswith(kind) for kind in alike) for name in TASKS)


def test_limit_and_total(tmp_path: Path) -> None:
    loaded = load(TASKS["refcoco_val"], write(tmp_path, CASES[[c.task for c in CASES].index("refcoco_val")]), limit=1)
    assert (len(loaded.samples), loaded.total) == (1, 2)


def test_the_halves_of_chartqa_are_read_together(tmp_path: Path) -> None:
    for half in ("human", "augmented"):
        lines = [{"image": "data/c.png", "question": "Q?", "question_id": i, "answer": "1"} for i in range(2)]
        write(tmp_path, CASES[0]._replace(files={f"chartqa/test_{half}.jsonl": lines}, images=("c.png",)))
    samples = load(TASKS["chartqa"], tmp_path).samples
    assert [sample.part for sample in samples] == ["human", "human", "augmented", "augmented"]


def test_images_are_found_from_above_and_inside_the_data_folder(tmp_path: Path) -> None:
    root = tmp_path / "sets"
    root.mkdir()
    (root / "a.png").write_bytes(png())
    (tmp_path / "b.png").write_bytes(png())
    data = DataFolder(root)
    assert data.image("data/a.png") == str(root / "a.png")
    assert data.image("b.png") == str(tmp_path / "b.png")
    assert data.image("none.png", "folder") == str(root / "folder" / "none.png")
    assert data.image(str(root / "a.png")) == str(root / "a.png")


def test_a_missing_data_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load(TASKS["mme"], tmp_path / "none")


def test_a_question_without_people_is_named(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.task == "okvqa_val")
    root = write(tmp_path, case)
    path = root / "okvqa/mscoco_val2014_annotations.json"
    path.write_text(path.read_text().replace('"question_id": 12', '"question_id": 99'))
    with pytest.raises(DataError, match="question 12"):
        load(TASKS["okvqa_val"], root)


def test_groups_hold_tasks_and_unknown_names_are_refused() -> None:
    assert all(name in TASKS for group in GROUPS.values() for name in group)
    assert [task.name for task in chosen(["captions", "flickr"])] == ["flickr", "nocaps"]
    with pytest.raises(ConfigError, match="refcoco_val"):
        chosen(["refcoco"])
