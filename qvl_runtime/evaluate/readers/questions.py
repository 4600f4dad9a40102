"""Questions with short answers: the original's lines of JSON, and VQA's own files of questions and annotations."""

from __future__ import annotations

from collections.abc import Iterator

from qvl_runtime.errors import DataError
from qvl_runtime.evaluate.readers.folder import DataFolder, Record
from qvl_runtime.evaluate.samples import Reference, Sample


def question_lines(data: DataFolder, name: str, annotations: str | None = None, part: str = "") -> Iterator[Sample]:
    """The original's lines: image, question, question_id and, unless it is a test split, answer.

    With `annotations`, a file in VQA's form, the references are its ten records instead of the answer.
    """
    people = vqa_annotations(data, annotations) if annotations else None
    for number, record in enumerate(data.lines(name)):
        question_id = record.id("question_id") if "question_id" in record.values else number
        references: tuple[Reference, ...] = ()
        facts = {}
        if people is not None:
            references, facts["answer_type"] = _of(people, question_id, record.where)
        elif record.values.get("answer") is not None:
            references = record.texts("answer")
        yield Sample(
            question_id,
            (data.image(record.text("image")),),
            record.text("question"),
            references=references,
            part=part,
            facts=facts,
        )


def vqa_questions(data: DataFolder, name: str, annotations: str | None, images: str) -> Iterator[Sample]:
    """VQA's own files; `images` is a path of the data folder with a place for the image's number."""
    people = vqa_annotations(data, annotations) if annotations else None
    for record in data.records(name, "questions"):
        question_id, facts = record.id("question_id"), {}
        references: tuple[Reference, ...] = ()
        if people is not None:
            references, facts["answer_type"] = _of(people, question_id, record.where)
        image = images.format(record.get("image_id", int))
        yield Sample(question_id, (data.image(image),), record.text("question"), references=references, facts=facts)


People = dict[str, tuple[tuple[Reference, ...], str]]  # by question: the records of its answers, and their type


def vqa_annotations(data: DataFolder, name: str) -> People:
    """The answers of ten people to each question."""
    people: People = {}
    for record in data.records(name, "annotations"):
        answers = record.get("answers", list)
        for answer in answers:
            Record(answer, record.where).text("answer")
        people[str(record.id("question_id"))] = tuple(answers), str(record.values.get("answer_type", ""))
    return people


def _of(people: People, question_id: str | int, where: str) -> tuple[tuple[Reference, ...], str]:
    found = people.get(str(question_id))
    if found is None or not found[0]:
        raise DataError(f"{where} asks question {question_id}, which the annotations do not answer: fetch both again")
    return found
