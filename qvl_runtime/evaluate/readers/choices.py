"""Multiple choice: ScienceQA, MMBench and SEED-Bench, converted by the original's scripts or as their authors have it.

The reference of a question is the number of the right option, from 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from qvl_runtime.errors import DataError, quoted
from qvl_runtime.evaluate.readers.folder import DataFolder, Record
from qvl_runtime.evaluate.samples import LETTERS, Sample

# How a file of base64 begins, by kind of image; a data URL names one, though the bytes are what counts.
_KINDS = {"/9j/": "jpeg", "iVBO": "png", "R0lG": "gif", "UklG": "webp", "Qk": "bmp"}
_SEED_PROMPT = re.compile(r"((?:<img>[^<]*</img>\n)+)Question: (.*)\nOptions: (A\. .*)\nAnswer:", re.DOTALL)


def choice_lines(data: DataFolder, name: str, id_key: str | None = None) -> Iterator[Sample]:
    """Lines of image, hint, question, choices and, unless it is a test split, answer."""
    for number, record in enumerate(data.lines(name)):
        answer = record.values.get("answer")
        yield _choice(
            record.id(id_key) if id_key else number,
            data.image(record.text("image")),
            record.text("question"),
            record.texts("choices"),
            str(record.values.get("hint") or ""),
            None if answer is None else record.get("answer", int),
            record,
        )


def scienceqa(data: DataFolder, name: str, split: str = "test") -> Iterator[Sample]:
    """problems.json of ScienceQA: the questions of a split that have an image."""
    for number, entry in data.json(name).items():
        record = Record(entry, f"{data.path(name)} problem {number}")
        if record.text("split") == split and record.values.get("image"):
            image = data.image(f"{number}/{record.text('image')}", f"scienceqa/images/{split}")
            question, hint = record.text("question"), str(record.values.get("hint") or "")
            yield _choice(number, image, question, record.texts("choices"), hint, record.get("answer", int), record)


def mmbench_table(data: DataFolder, name: str) -> Iterator[Sample]:
    """MMBench's own TSV with images in base64; its rows with index + k million are rotations of row index."""
    for row in data.table(name):
        options = tuple(row.values[letter] for letter in LETTERS[:4] if row.values.get(letter))
        answer = row.values.get("answer") or None
        if answer is not None and (len(answer) != 1 or answer not in LETTERS[: len(options)]):
            raise DataError(f"{row.where} has answer {quoted(answer)}; expected the letter of an option")
        hint = "" if (hint := row.values.get("hint") or "") == "nan" else hint
        number = None if answer is None else LETTERS.index(answer)
        index = _whole(row.text("index"), row)
        yield _choice(index, data_url(row.text("image")), row.text("question"), options, hint, number, row)


def seed_lines(data: DataFolder, name: str, part: str) -> Iterator[Sample]:
    """The original's lines: question_id, answer, and a prompt that is taken apart here and put together again."""
    for record in data.lines(name):
        match = _SEED_PROMPT.fullmatch(record.text("prompt"))
        options = re.split(r"\n(?=[A-E]\. )", match[3]) if match else []
        letters = [option[0] for option in options]
        if match is None or letters != list(LETTERS[: len(options)]):
            found = quoted(record.text("prompt"))
            raise DataError(f"{record.where} has prompt {found}; expected images, Question:, Options: A. … and Answer:")
        images = tuple(data.image(path, "seed_bench") for path in re.findall("<img>(.*?)</img>", match[1]))
        answer = _letter(record)
        texts = tuple(option[3:] for option in options)
        yield Sample(record.id("question_id"), images, match[2], texts, references=(answer,), part=part)


def seed_bench(data: DataFolder, name: str, images: str, frames: str) -> Iterator[Sample]:
    """SEED-Bench.json: images as they are, videos as the frames QUESTION_0.jpg … that the original's script writes."""
    for record in data.records(name, "questions"):
        question_id = record.id("question_id")
        if record.get("question_type_id", int) <= 9:
            part, paths = "image", [data.image(record.text("data_id"), images)]
        else:
            part, paths = "video", _frames(data, frames, question_id)
        options = tuple(record.text(f"choice_{letter}") for letter in "abcd")
        answer = _letter(record)
        yield Sample(question_id, tuple(paths), record.text("question"), options, references=(answer,), part=part)


def _frames(data: DataFolder, folders: str, question_id: str | int) -> list[str]:
    """The frames of a video, 8 or else 4 of them, in order; the first name of the larger set where there are none."""
    for count in (8, 4):
        paths = [data.path(f"{folders}_{count}/{question_id}_{i}.jpg") for i in range(count)]
        if paths[0].exists():
            return [str(path) for path in paths]
    return [str(data.path(f"{folders}_8/{question_id}_0.jpg"))]


def data_url(base64: str) -> str:
    """Base64 of an image as a data URL."""
    text = base64.strip()
    kind = next((kind for beginning, kind in _KINDS.items() if text.startswith(beginning)), "jpeg")
    return f"data:image/{kind};base64,{text}"


def _choice(
    number: str | int,
    image: str,
    question: str,
    options: tuple[str, ...],
    hint: str,
    answer: int | None,
    record: Record,
) -> Sample:
    if not 2 <= len(options) <= len(LETTERS) or not (answer is None or 0 <= answer < len(options)):
        raise DataError(
            f"{record.where} has {len(options)} options and answer {answer}; expected 2 to {len(LETTERS)} options "
            "and the number of one of them, from 0"
        )
    references = () if answer is None else (answer,)
    return Sample(number, (image,), question, options, "" if hint == "N/A" else hint, references)


def _letter(record: Record) -> int:
    letter = record.text("answer")
    if len(letter) != 1 or letter not in LETTERS:
        raise DataError(f"{record.where} has answer {quoted(letter)}; expected a letter, A to {LETTERS[-1]}")
    return LETTERS.index(letter)


def _whole(text: str, record: Record) -> int:
    try:
        return int(float(text))
    except ValueError:
        raise DataError(f"{record.where} has index {quoted(text)}; expected a whole number") from None
