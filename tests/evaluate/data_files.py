"""Hand-made data sets of two samples in each layout that a reader knows, and what is read from them."""

from __future__ import annotations

import base64
import io
import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from qvl_runtime.evaluate.readers.dialogues import SUBTASKS


@cache
def png(color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), color).save(buffer, "PNG")
    return buffer.getvalue()


PNG64 = base64.b64encode(png()).decode()


class Files(NamedTuple):
    """A data folder of one task."""

    task: str
    files: dict[str, Any]  # by path: text, objects of JSON, or a list of the lines of a .jsonl
    images: tuple[str, ...]  # paths of images in the data folder
    ids: tuple[Any, ...]
    references: tuple[Any, ...]  # of each sample
    required: str  # a key of the first file without which it is refused
    name: str = ""  # where a task has several layouts


def write(root: Path, case: Files) -> Path:
    """Write a data folder and return it."""
    for name, content in case.files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            text = content
        elif name.endswith(".jsonl"):
            text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in content)
        else:
            text = json.dumps(content, ensure_ascii=False)
        path.write_text(text, encoding="utf-8")
    for name in case.images:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png())
    return root


def people(*answers: str) -> list[dict[str, Any]]:
    return [{"answer": answer, "answer_confidence": "yes", "answer_id": i} for i, answer in enumerate(answers, 1)]


RED, TWO = people(*["red"] * 10), people(*["2"] * 9, "3")
WITHOUT_CONFIDENCE = tuple(
    tuple({"answer": one["answer"], "answer_id": one["answer_id"]} for one in ten) for ten in (RED, TWO)
)
ANNOTATIONS = {
    "annotations": [
        {"question_id": 11, "question_type": "what", "answer_type": "other", "answers": RED},
        {"question_id": 12, "question_type": "how many", "answer_type": "number", "answers": TWO},
    ]
}
OFFICIAL = {
    "questions": [
        {"image_id": 7, "question": "What color?", "question_id": 11},
        {"image_id": 8, "question": "How many?", "question_id": 12},
    ]
}


def lines(folder: str, *answers: Any) -> list[dict[str, Any]]:
    """Two lines of the original's; without answers, those of a test split."""
    questions = ("What color?", "How many?")
    return [
        {"image": f"data/{folder}/{i}.png", "question": question, "question_id": 11 + i}
        | ({"answer": answers[i]} if answers else {})
        for i, question in enumerate(questions)
    ]


def of_lines(task: str, file: str, folder: str, *answers: Any, references: tuple[Any, ...] | None = None) -> Files:
    read = tuple((answer,) if isinstance(answer, str) else tuple(answer) for answer in answers) or ((), ())
    images = (f"{folder}/0.png", f"{folder}/1.png")
    return Files(task, {file: lines(folder, *answers)}, images, (11, 12), references or read, "question")


def with_people(task: str, file: str, annotations: str) -> Files:
    case = of_lines(task, file, "x", references=(tuple(RED), tuple(TWO)))
    return case._replace(files={**case.files, annotations: ANNOTATIONS})


SCIENCE = [
    {"image": "data/s/0.png", "hint": "A hint.", "question": "Which?", "choices": ["cat", "dog"], "answer": 1},
    {"image": "data/s/1.png", "hint": "", "question": "What?", "choices": ["a", "b", "c", "d", "e"], "answer": 4},
]
MMBENCH = [{"index": i, **line} for i, line in ((3, SCIENCE[0]), (1_000_003, SCIENCE[0]))]
MMBENCH_TSV = (
    "index\tquestion\thint\tA\tB\tC\tD\tanswer\timage\n"
    f"3\tWhich?\tnan\tcat\tdog\t\t\tB\t{PNG64}\n1000003\tWhich?\t\tdog\tcat\t\t\tA\t{PNG64}\n"
)


def seed_line(number: str, images: int, answer: str = "C") -> dict[str, Any]:
    tags = "".join(f"<img>seed_bench/frames/{i}.png</img>\n" for i in range(images))
    prompt = f"{tags}Question: What\nis it?\nOptions: A. one\nB. two\nC. B. three\nD. four\nAnswer:"
    return {"question_id": number, "prompt": prompt, "answer": answer}


SEED_QUESTIONS = {
    "questions": [
        {"question_id": "q", "question_type_id": 1, "data_id": "x.png", "question": "Q", "answer": "A"}
        | {f"choice_{letter}": letter for letter in "abcd"},
        {"question_id": "v0", "question_type_id": 10, "data_id": "x.webm", "question": "Q", "answer": "D"}
        | {f"choice_{letter}": letter for letter in "abcd"},
    ]
}
SEED_IMAGES = tuple(f"seed_bench/frames/{i}.png" for i in range(4))
REFCOCO = [
    {"image": "data/coco/0.png", "sent": "left dog", "bbox": [1, 2, 10.5, 8], "width": 20, "height": 10},
    {"image": "data/coco/1.png", "sent": "cat", "bbox": [0, 0, 20, 10], "width": 20, "height": 10},
]
COCO = {
    "images": [{"id": 5, "image": "data/f/0.png"}, {"id": 6, "image": "data/f/1.png"}],
    "annotations": [
        {"id": 1, "image_id": 5, "caption": "A dog."},
        {"id": 2, "image_id": 6, "caption": "A cat."},
        {"id": 3, "image_id": 5, "caption": "One dog runs."},
    ],
}
KARPATHY = {
    "images": [
        {"split": "train", "filename": "no.jpg", "imgid": 0, "sentences": []},
        {"split": "test", "filename": "0.png", "imgid": 5, "sentences": [{"raw": "A dog."}, {"raw": "One dog runs."}]},
        {"split": "test", "filename": "1.png", "imgid": 6, "sentences": [{"raw": "A cat."}]},
    ]
}
CAPTIONS = (("A dog.", "One dog runs."), ("A cat.",))
MME_TEXT = "0.png\tIs there a dog?\tYes\n0.png\tIs there a cat?\tNo\n"
MME_IDS = tuple(f"{subtask}/0.png/{i}" for subtask in SUBTASKS for i in (1, 2))
TOUCHSTONE = (
    "index\timage\tquestion\thuman_annotation\tgpt4_ha_answer\tcategory\ttask_name\n"
    f"0\t{PNG64}\tWhat is it?\tA dog.\tIt is a dog.\tbasic\tdescribe\n"
    f'1\t{PNG64}\t"A ""quoted"" question"\tA cat.\tIt is a cat.\tbasic\tdescribe\n'
)
BOXES = (((1.0, 2.0, 10.5, 8.0),), ((0.0, 0.0, 20.0, 10.0),))
