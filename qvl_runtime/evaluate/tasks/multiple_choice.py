"""The tasks with a choice by likelihood."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from qvl_runtime.evaluate.metrics import table as metrics
from qvl_runtime.evaluate.prompts import OPTIONS, SEED
from qvl_runtime.evaluate.readers import choices
from qvl_runtime.evaluate.tasks.task import Task, layout, several


def choices_tasks() -> Iterator[Task]:
    """Multiple choice among lettered options."""
    ask = partial(Task, form=OPTIONS, limits=(0, 1), metric=metrics.CHOICE)
    yield ask(
        "scienceqa_test_img",
        "ScienceQA-Img (test)",
        layouts=(
            layout(choices.choice_lines, "scienceqa/scienceqa_test_img.jsonl"),
            layout(choices.scienceqa, "scienceqa/problems.json"),
        ),
        source="https://scienceqa.github.io",
    )
    for split in ("dev", "test"):
        name = f"mmbench_{split}_20230712"
        yield ask(
            name,
            f"MMBench ({split})",
            metric=metrics.MMBENCH,
            layouts=(
                layout(choices.choice_lines, f"mmbench/{name}/{name}.jsonl", id_key="index"),
                layout(choices.mmbench_table, f"mmbench/{name}/{name}.tsv"),
                layout(choices.mmbench_table, f"mmbench/{name}.tsv"),
            ),
            source="https://github.com/open-compass/MMBench",
            submission="mmbench",
        )
    frames = "seed_bench/video_imgs"
    images = layout(choices.seed_lines, "seed_bench/image_input.jsonl", part="image")
    videos = tuple(
        layout(choices.seed_lines, f"seed_bench/video_input_{count}.jsonl", part="video") for count in (8, 4)
    )
    own = layout(choices.seed_bench, "seed_bench/SEED-Bench.json", images="seed_bench/seed_bench_image", frames=frames)
    seed = partial(ask, form=SEED, source="https://github.com/AILab-CVC/SEED-Bench", submission="seed")
    yield seed("seed_bench", "SEED-Bench", layouts=(*(several(images, video) for video in videos), own))
    yield seed("seed_bench_image", "SEED-Bench (images)", layouts=(images,))
    yield seed("seed_bench_video", "SEED-Bench (video)", layouts=videos)
