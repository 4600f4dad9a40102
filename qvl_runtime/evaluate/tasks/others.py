"""The tasks with captions, boxes and chats."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from qvl_runtime.evaluate.metrics import table as metrics
from qvl_runtime.evaluate.metrics.scenes import SCENES
from qvl_runtime.evaluate.prompts import BOX, CAPTION, OPEN, SCENE, YES_NO
from qvl_runtime.evaluate.readers import captions, dialogues, expressions
from qvl_runtime.evaluate.tasks.task import Layout, Task, layout


def captions_tasks() -> Iterator[Task]:
    """Captions in one sentence."""
    ask = partial(Task, form=CAPTION, limits=(8, 30), metric=metrics.CIDER, submission="captions")
    yield ask(
        "flickr",
        "Flickr30K (Karpathy test)",
        layouts=(
            layout(
                captions.coco_captions, "flickr30k/flickr30k_karpathy_test.json", images="flickr30k/flickr30k-images"
            ),
            layout(captions.coco_captions, "flickr/flickr30k_karpathy_test.json", images="flickr/flickr30k-images"),
            layout(captions.karpathy, "flickr30k/dataset_flickr30k.json", images="flickr30k/flickr30k-images"),
        ),
        source="https://bryanplummer.com/Flickr30kEntities/ and https://cs.stanford.edu/people/karpathy/deepimagesent/",
    )
    yield ask(
        "nocaps",
        "NoCaps (val)",
        layouts=(
            layout(captions.coco_captions, "nocaps/nocaps_val.json", images="nocaps/images"),
            layout(captions.coco_captions, "nocaps/nocaps_val_4500_captions.json", images="nocaps/images"),
        ),
        source="https://nocaps.org/download",
    )


def boxes_tasks() -> Iterator[Task]:
    """Boxes of what an expression refers to."""
    ask = partial(Task, form=BOX, limits=(10, 28), metric=metrics.BOXES)
    for name, splits in {
        "refcoco": ("val", "testA", "testB"),
        "refcoco+": ("val", "testA", "testB"),
        "refcocog": ("val", "test"),
    }.items():
        title = {"refcoco": "RefCOCO", "refcoco+": "RefCOCO+", "refcocog": "RefCOCOg"}[name]
        for split in splits:
            yield ask(
                f"{name}_{split}",
                f"{title} ({split})",
                layouts=(layout(expressions.refcoco, f"{name}/{name}_{split}.jsonl"),),
                source="https://github.com/lichengunc/refer; images: https://cocodataset.org",
                submission="boxes",
            )
    yield ask(
        "grit_refexp",
        "GRIT refexp",
        layouts=(layout(expressions.grit, "GRIT/samples/test/refexp.json"),),
        source="https://github.com/allenai/grit_official",
        submission="grit",
    )


def dialogues_tasks() -> Iterator[Task]:
    """Chat turns: MME's yes or no, and TouchStone's open questions, which another model judges."""
    source = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models"
    texts = tuple(f"mme/Your_Results/{subtask}.txt" for subtask in dialogues.SUBTASKS)
    folders = tuple(f"MME_Benchmark_release/{subtask}/" for subtask in dialogues.SUBTASKS)
    yield Task(
        "mme",
        "MME",
        YES_NO,
        (0, 512),
        metrics.MME,
        (
            Layout(texts, lambda data: dialogues.mme_results(data, "mme")),
            Layout(folders, lambda data: dialogues.mme_release(data, "MME_Benchmark_release")),
        ),
        source,
        submission="mme",
    )
    for language, file in {"en": "touchstone_20230831.tsv", "cn": "touchstone_20230831_cn.tsv"}.items():
        yield Task(
            f"touchstone_{language}",
            f"TouchStone ({language.upper()})",
            OPEN,
            (0, 512),
            None,
            (layout(dialogues.touchstone, f"touchstone/{file}"),),
            "https://github.com/OFA-Sys/TouchStone",
            submission="touchstone",
        )


def scenes_tasks() -> Iterator[Task]:
    """The scenes of nano, the checkpoint that ships with the package, in English and Chinese."""
    source = "python -m tools.nano.datasets in a checkout"
    for name, title in {"scenes": "nano's scenes", "scenes_zh": "nano's scenes (Chinese)"}.items():
        where = (layout(dialogues.scenes, f"scenes/{name}.jsonl"),)
        yield Task(name, title, SCENE, (0, 120), SCENES, where, source)
