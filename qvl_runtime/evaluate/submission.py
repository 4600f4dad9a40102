"""Files to submit, in the form of the original's scripts, for splits whose answers are secret, and for all others."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qvl_runtime.evaluate.metrics.boxes import first_box, in_pixels
from qvl_runtime.evaluate.samples import LETTERS
from qvl_runtime.evaluate.scoring import Answer, Context

Files = dict[str, str]  # text by name
Form = Callable[[Sequence[Answer], Context], Files]


def write_submission(form: str, answers: Sequence[Answer], context: Context, folder: Path) -> list[Path]:
    """Write the files of a submission into a folder, and return them. An error is submitted as an empty answer."""
    paths = []
    for name, text in FORMS[form](answers, context).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        paths.append(path)
    return paths


def _json(entries: list[dict[str, Any]]) -> Files:
    return {"submission.json": json.dumps(entries, ensure_ascii=False)}


def _captions(answers: Sequence[Answer], context: Context) -> Files:
    return _json([{"image_id": a.sample.id, "caption": a.text.strip()} for a in answers])


def _vqa(answers: Sequence[Answer], context: Context) -> Files:
    return _json([{"question_id": a.sample.id, "answer": a.text.strip()} for a in answers])


def _question_id(answers: Sequence[Answer], context: Context) -> Files:
    return _json([{"questionId": a.sample.id, "answer": a.text.strip()} for a in answers])


def _vizwiz(answers: Sequence[Answer], context: Context) -> Files:
    return _json([{"image": a.sample.facts.get("image", a.sample.id), "answer": a.text.strip()} for a in answers])


def _boxes(answers: Sequence[Answer], context: Context) -> Files:
    entries = []
    for a in answers:
        hw = [a.sample.facts["height"], a.sample.facts["width"]]
        entries.append({"answer": a.text, "gt_bbox": list(a.sample.references[0]), "hw": hw})
    return _json(entries)


def _grit(answers: Sequence[Answer], context: Context) -> Files:
    """GRIT's refexp.json: whole pixels of the images, whose sizes the data set does not tell."""
    from PIL import Image

    entries = []
    for a in answers:
        box = [0] * 4
        if a.error is None:
            with Image.open(a.sample.images[0]) as image:
                box = [round(v) for v in in_pixels(first_box(a.text), image.width, image.height, context.scale)]
        entries.append({"example_id": a.sample.id, "bboxes": [box], "confidence": 1.0})
    return {"submission/refexp.json": json.dumps(entries, ensure_ascii=False)}


def _mmbench(answers: Sequence[Answer], context: Context) -> Files:
    return _json([{"index": a.sample.id, "prediction": LETTERS.index(a.text) if a.text else 0} for a in answers])


def _seed(answers: Sequence[Answer], context: Context) -> Files:
    lines = [json.dumps({"question_id": a.sample.id, "prediction": a.text}) for a in answers]
    return {"submission.jsonl": "\n".join(lines) + "\n"}


def _mme(answers: Sequence[Answer], context: Context) -> Files:
    """One text a subtask: image, question, right answer and answer, with tabs."""
    texts: dict[str, list[str]] = defaultdict(list)
    for a in answers:
        columns = (a.sample.facts["image"], a.sample.question, a.sample.facts["answer"], " ".join(a.text.split()))
        texts[a.sample.part].append("\t".join(columns))
    return {f"submission/{part}.txt": "\n".join(lines) + "\n" for part, lines in texts.items()}


def _touchstone(answers: Sequence[Answer], context: Context) -> Files:
    out = io.StringIO()
    table = csv.writer(out, delimiter="\t", lineterminator="\n")
    facts = ("human_annotation", "gpt4_ha_answer", "category", "task_name")
    table.writerow(["index", "question", *facts, "response"])
    for a in answers:
        table.writerow([a.sample.id, a.sample.question, *(a.sample.facts[name] for name in facts), a.text])
    return {"submission.tsv": out.getvalue()}


FORMS: dict[str, Form] = {
    "captions": _captions,
    "vqa": _vqa,
    "question_id": _question_id,
    "vizwiz": _vizwiz,
    "boxes": _boxes,
    "grit": _grit,
    "mmbench": _mmbench,
    "seed": _seed,
    "mme": _mme,
    "touchstone": _touchstone,
}
