"""A task: where its questions are, how they are asked, how many tokens an answer has, and its metric."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from qvl_runtime.evaluate.prompts import Form
from qvl_runtime.evaluate.readers import questions
from qvl_runtime.evaluate.readers.folder import DataFolder
from qvl_runtime.evaluate.samples import Sample
from qvl_runtime.evaluate.scoring import Metric

Reader = Callable[[DataFolder], Iterable[Sample]]


class Layout(NamedTuple):
    """Files that hold a data set, in the data folder, and what reads them."""

    files: tuple[str, ...]  # all of them must be there; a name that ends in / is a folder
    read: Reader


@dataclass(frozen=True, slots=True)
class Task:
    """A split of a data set."""

    name: str
    title: str
    form: Form
    limits: tuple[int, int]  # fewest and most tokens of an answer
    metric: Metric | None  # None: another model judges
    layouts: tuple[Layout, ...]  # the first whose files are there is read
    source: str  # where the authors of the data set publish it
    train: Layout | None = None  # of examples
    submission: str | None = None  # the form of its submission, a name of `submission.FORMS`


def layout(reader: Callable[..., Iterable[Sample]], *files: str, **options: Any) -> Layout:
    """A layout whose reader takes its first file, and `options`."""
    return Layout(files, lambda data: reader(data, files[0], **options))


def lines(name: str, annotations: str | None = None, part: str = "") -> Layout:
    """The original's lines of questions, with a file of annotations for the VQA score."""
    files = (name, annotations) if annotations else (name,)
    return Layout(files, lambda data: questions.question_lines(data, name, annotations, part))


def vqa(folder: str, prefix: str, year: str, split: str, answered: bool = True) -> Layout:
    """VQA's own files of a split, whose images are COCO's."""
    asked = f"{folder}/{prefix}OpenEnded_mscoco_{split}{year}_questions.json"
    people = f"{folder}/{prefix}mscoco_{split}{year}_annotations.json" if answered else None
    images = f"coco/{split.split('-')[0]}{year}/COCO_{split.split('-')[0]}{year}_{{:012d}}.jpg"
    files = (asked, people) if people else (asked,)
    return Layout(files, lambda data: questions.vqa_questions(data, asked, people, images))


def several(*layouts: Layout) -> Layout:
    """One data set of several."""

    def read(data: DataFolder) -> Iterator[Sample]:
        for one in layouts:
            yield from one.read(data)

    return Layout(tuple(file for one in layouts for file in one.files), read)
