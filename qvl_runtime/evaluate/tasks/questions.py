"""The tasks with short answers: visual questions, documents, charts, diagrams and book covers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from qvl_runtime.evaluate.metrics import table as metrics
from qvl_runtime.evaluate.prompts import ANSWER
from qvl_runtime.evaluate.readers import official
from qvl_runtime.evaluate.tasks.task import Task, layout, lines, several, vqa


def answers_tasks() -> Iterator[Task]:
    """Questions about photographs and diagrams, answered in at most 10 tokens."""
    ten = partial(Task, form=ANSWER, limits=(1, 10), metric=metrics.VQA, submission="vqa")
    site, coco = "https://visualqa.org/download.html", "images: https://cocodataset.org"
    train = lines("vqav2/vqav2_train.jsonl")
    annotations = "vqav2/v2_mscoco_val2014_annotations.json"
    yield ten(
        "vqav2_val",
        "VQAv2 (val)",
        layouts=(lines("vqav2/vqav2_val.jsonl", annotations), vqa("vqav2", "v2_", "2014", "val")),
        source=f"{site}; {coco}",
        train=train,
    )
    yield ten(
        "vqav2_testdev",
        "VQAv2 (test-dev)",
        layouts=(lines("vqav2/vqav2_testdev.jsonl"), vqa("vqav2", "v2_", "2015", "test-dev", False)),
        source=f"{site}; {coco}",
        train=train,
    )
    yield ten(
        "okvqa_val",
        "OK-VQA (val)",
        layouts=(
            lines("okvqa/okvqa_val.jsonl", "okvqa/mscoco_val2014_annotations.json"),
            vqa("okvqa", "", "2014", "val"),
        ),
        source=f"https://okvqa.allenai.org/download.html; {coco}",
        train=lines("okvqa/okvqa_train.jsonl"),
    )
    yield ten(
        "textvqa_val",
        "TextVQA (val)",
        layouts=(
            lines("textvqa/textvqa_val.jsonl", "textvqa/textvqa_val_annotations.json"),
            layout(official.textvqa, "textvqa/TextVQA_0.5.1_val.json"),
        ),
        source="https://textvqa.org/dataset/",
        train=lines("textvqa/textvqa_train.jsonl"),
    )
    train, vizwiz = lines("vizwiz/vizwiz_train.jsonl"), "https://vizwiz.org/tasks-and-datasets/vqa/"
    yield ten(
        "vizwiz_val",
        "VizWiz (val)",
        layouts=(
            lines("vizwiz/vizwiz_val.jsonl", "vizwiz/vizwiz_val_annotations.json"),
            layout(official.vizwiz, "vizwiz/val.json", images="vizwiz/val"),
        ),
        source=vizwiz,
        train=train,
    )
    yield ten(
        "vizwiz_test",
        "VizWiz (test)",
        layouts=(
            lines("vizwiz/vizwiz_test.jsonl"),
            layout(official.vizwiz, "vizwiz/test.json", images="vizwiz/test"),
        ),
        source=vizwiz,
        train=train,
        submission="vizwiz",
    )
    yield ten(
        "gqa_testdev",
        "GQA (test-dev balanced)",
        metric=metrics.GQA,
        submission="question_id",
        layouts=(lines("gqa/testdev_balanced.jsonl"), layout(official.gqa, "gqa/testdev_balanced_questions.json")),
        source="https://cs.stanford.edu/people/dorarad/gqa/download.html",
        train=lines("gqa/train.jsonl"),
    )
    yield ten(
        "ai2diagram",
        "AI2D (test)",
        metric=metrics.EXACT,
        submission="question_id",
        layouts=(lines("ai2diagram/test.jsonl"),),
        source="https://allenai.org/data/diagrams",
        train=lines("ai2diagram/train.jsonl"),
    )


def documents_tasks() -> Iterator[Task]:
    """Questions about documents, charts and covers, answered in at most 100 tokens."""
    hundred = partial(Task, form=ANSWER, limits=(1, 100), metric=metrics.ANLS, submission="question_id")
    train, docvqa = lines("docvqa/train.jsonl"), "https://www.docvqa.org/datasets"
    for split in ("val", "test"):
        yield hundred(
            f"docvqa_{split}",
            f"DocVQA ({split})",
            layouts=(
                lines(f"docvqa/{split}.jsonl"),
                layout(official.docvqa, f"docvqa/{split}/{split}_v1.0.json", images=f"docvqa/{split}"),
            ),
            source=docvqa,
            train=train,
        )
    halves = ("human", "augmented")
    converted = {half: lines(f"chartqa/test_{half}.jsonl", part=half) for half in halves}
    own = {half: layout(official.chartqa, f"chartqa/test/test_{half}.json", part=half) for half in halves}
    chart = partial(
        hundred,
        metric=metrics.RELAXED,
        source="https://github.com/vis-nlp/ChartQA",
        train=lines("chartqa/train.jsonl"),
    )
    yield chart("chartqa", "ChartQA (test)", layouts=(several(*converted.values()), several(*own.values())))
    for half in halves:
        yield chart(f"chartqa_test_{half}", f"ChartQA ({half})", layouts=(converted[half], own[half]))
    for split, number in (("val", 2), ("test", 3)):
        yield hundred(
            f"ocrvqa_{split}",
            f"OCR-VQA ({split})",
            metric=metrics.EXACT,
            layouts=(
                lines(f"ocrvqa/ocrvqa_{split}.jsonl"),
                layout(official.ocrvqa, "ocrvqa/dataset.json", split=number),
            ),
            source="https://ocr-vqa.github.io",
            train=lines("ocrvqa/ocrvqa_train.jsonl"),
        )
