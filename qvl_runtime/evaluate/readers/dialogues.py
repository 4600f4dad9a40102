"""MME's folders of yes-no questions, TouchStone's table of open ones, and the scenes that nano is tested on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qvl_runtime.errors import DataError, quoted
from qvl_runtime.evaluate.readers.choices import data_url
from qvl_runtime.evaluate.readers.folder import DataFolder
from qvl_runtime.evaluate.samples import Sample

PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR"  # MME's own order
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning"
SUBTASKS = (*PERCEPTION.split(), *COGNITION.split())
_IMAGES = (".jpg", ".jpeg", ".png")


def mme_results(data: DataFolder, name: str) -> Iterator[Sample]:
    """Your_Results/SUBTASK.txt with lines of image, question and answer, and images/SUBTASK/IMAGE, under `name`."""
    for subtask in SUBTASKS:
        file = f"{name}/Your_Results/{subtask}.txt"
        for number, line in enumerate(data.text(file).splitlines(), 1):
            if not line.strip():
                continue
            columns = line.strip().split("\t")
            where = f"{data.path(file)} line {number}"
            if len(columns) != 3:
                raise DataError(f"{where} has {len(columns)} columns; expected image, question and answer, with tabs")
            image, question, answer = columns
            path = data.image(image, f"{name}/images/{subtask}")
            yield _yes_no(subtask, image, number, path, question, answer, where)


def mme_release(data: DataFolder, name: str) -> Iterator[Sample]:
    """The released folders, SUBTASK with images and texts, or with `images` and `questions_answers_YN` in it."""
    for subtask in SUBTASKS:
        folder = data.path(f"{name}/{subtask}")
        texts = folder / "questions_answers_YN" if (folder / "questions_answers_YN").is_dir() else folder
        images = folder / "images" if (folder / "images").is_dir() else folder
        found = sorted(path for path in texts.glob("*.txt"))
        if not found:
            raise DataError(f"{texts} holds no questions; expected a text file for each image: fetch the folder again")
        for text in found:
            file = text.relative_to(data.root).as_posix()
            stem = _beside(images, text.stem)
            for number, line in enumerate(data.text(file).splitlines(), 1):
                if line.strip():
                    question, tab, answer = line.strip().rpartition("\t")
                    where = f"{text} line {number}"
                    if not tab:
                        raise DataError(f"{where} is {quoted(line)}; expected a question, a tab and Yes or No")
                    yield _yes_no(subtask, stem.name, number, str(stem), question, answer, where)


def touchstone(data: DataFolder, name: str) -> Iterator[Sample]:
    """TouchStone's TSV: index, image, question, human_annotation, gpt4_ha_answer, category and task_name."""
    needed = ("human_annotation", "gpt4_ha_answer", "category", "task_name")
    for number, row in enumerate(data.table(name)):
        facts = {column: row.text(column) for column in needed}
        index = row.values.get("index") or str(number)
        image = data_url(row.text("image"))
        yield Sample(index, (image,), row.text("question"), part=facts["category"], facts=facts)


def scenes(data: DataFolder, name: str) -> Iterator[Sample]:
    """Lines of image, sort, question and answer, as `python -m tools.nano.datasets` writes them."""
    for number, record in enumerate(data.lines(name)):
        image = data.image(record.text("image"))
        sort, answer = record.text("sort"), record.text("answer")
        yield Sample(number, (image,), record.text("question"), references=(answer,), part=sort)


def _yes_no(subtask: str, image: str, number: int, path: str, question: str, answer: str, where: str) -> Sample:
    right = answer.strip().lower()
    if right not in ("yes", "no"):
        raise DataError(f"{where} has the answer {quoted(answer)}; expected Yes or No")
    facts = {"image": image, "answer": answer.strip()}
    return Sample(f"{subtask}/{image}/{number}", (path,), question, references=(right,), part=subtask, facts=facts)


def _beside(folder: Path, stem: str) -> Path:
    """The image of this name, whatever its kind; a .jpg where there is none."""
    paths = [folder / f"{stem}{ending}" for ending in _IMAGES]
    return next((path for path in paths if path.exists()), paths[0])
