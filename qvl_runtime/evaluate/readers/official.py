"""The files that the authors of data sets publish, for where the original's converted ones cannot be had any more."""

from __future__ import annotations

from collections.abc import Iterator

from qvl_runtime.evaluate.readers.folder import DataFolder, Record
from qvl_runtime.evaluate.samples import Sample


def textvqa(data: DataFolder, name: str) -> Iterator[Sample]:
    """TextVQA_0.5.1_val.json; the ten answers get numbers, as the converted annotations have."""
    for record in data.records(name, "data"):
        image = data.image(f"textvqa/train_images/{record.text('image_id')}.jpg")
        people = tuple(
            {"answer": answer, "answer_id": number} for number, answer in enumerate(record.texts("answers"), 1)
        )
        yield Sample(record.id("question_id"), (image,), record.text("question"), references=people)


def vizwiz(data: DataFolder, name: str, images: str) -> Iterator[Sample]:
    """val.json and test.json of VizWiz; a submission names the image."""
    for record in data.records(name):
        people = tuple(
            {**Record(answer, record.where).values, "answer_id": number}
            for number, answer in enumerate(record.values.get("answers") or [], 1)
        )
        file = record.text("image")
        yield Sample(
            file,
            (data.image(file, images),),
            record.text("question"),
            references=people,
            facts={"answer_type": str(record.values.get("answer_type", "")), "image": file},
        )


def docvqa(data: DataFolder, name: str, images: str) -> Iterator[Sample]:
    """val_v1.0.json and test_v1.0.json of DocVQA."""
    for record in data.records(name, "data"):
        references = record.texts("answers") if record.values.get("answers") else ()
        image = data.image(record.text("image"), images)
        yield Sample(record.id("questionId"), (image,), record.text("question"), references=references)


def chartqa(data: DataFolder, name: str, part: str) -> Iterator[Sample]:
    """test_human.json and test_augmented.json of ChartQA."""
    for number, record in enumerate(data.records(name)):
        image = data.image(f"chartqa/test/png/{record.text('imgname')}")
        yield Sample(number, (image,), record.text("query"), references=record.texts("label"), part=part)


def gqa(data: DataFolder, name: str) -> Iterator[Sample]:
    """testdev_balanced_questions.json of GQA: an object of questions by id."""
    for question_id, entry in data.json(name).items():
        record = Record(entry, f"{data.path(name)} question {question_id}")
        image = data.image(f"gqa/images/{record.text('imageId')}.jpg")
        yield Sample(question_id, (image,), record.text("question"), references=record.texts("answer"))


def ocrvqa(data: DataFolder, name: str, split: int) -> Iterator[Sample]:
    """dataset.json of OCR-VQA: books, of which those of a split (1 train, 2 validation, 3 test) are asked about."""
    for book, entry in data.json(name).items():
        record = Record(entry, f"{data.path(name)} book {book}")
        if record.get("split", int) != split:
            continue
        ending = record.text("imageURL").rsplit(".", 1)[-1]
        image = data.image(f"ocrvqa/images/{book}.{ending}")
        for number, (question, answer) in enumerate(
            zip(record.texts("questions"), record.texts("answers"), strict=False)
        ):
            yield Sample(f"{book}_{number}", (image,), question, references=(answer,))
