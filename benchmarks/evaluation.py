"""Samples per second of `qvl evaluate` by kind of task: `python -m benchmarks.evaluation DATA [--samples 200]`.

DATA is a folder that `python -m tools.nano.datasets` writes. Each kind is asked three ways, in turns, on engines of
their own: all together, as `qvl evaluate` asks; one call after another on an engine with the same caches of images and
prefixes; and one after another without caches. Prints JSON lines.

`--synthetic qwen-vl-chat-int4 --samples 4` asks a model of the published size, whose answers are noise, once, together.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from benchmarks.timing import others, say, setting
from qvl_runtime import Engine
from qvl_runtime.config.engine import PRECISIONS, EngineConfig
from qvl_runtime.evaluate.asking import EngineAsker, Numbered
from qvl_runtime.evaluate.loading import load
from qvl_runtime.evaluate.prompts import Style
from qvl_runtime.evaluate.tasks.table import TASKS

# Kind: the task that stands for it, its style, and what it is like.
KINDS = {
    "answers, 10 tokens": ("vqav2_val", "original"),
    "boxes, 10 to 28 tokens": ("refcoco_val", "original"),
    "captions, 8 to 30 tokens": ("flickr", "original"),
    "choice, one prefill": ("scienceqa_test_img", "chat"),  # letters are single tokens of nano's without a blank
    "chat about shared images": ("scenes", "original"),
}
ROUNDS = 3


def questions(data: Path, task: str, style: str, samples: int) -> list[Numbered]:
    """The first questions of a task."""
    loaded = load(TASKS[task], data, samples)
    asked = (Style(style).ask(sample, TASKS[task].form, TASKS[task].limits) for sample in loaded.samples)
    return list(enumerate(asked))


@contextmanager
def timed(found: list[float], count: int) -> Iterator[None]:
    """Append how many a second the body answered."""
    began = time.perf_counter()
    yield
    found.append(count / (time.perf_counter() - began))


def _asker(model: str | None, way: str) -> EngineAsker:
    """An engine whose caches are empty, or off."""
    cached = not way.endswith("no caches")
    bytes_kept = EngineConfig().image_cache_bytes if cached else 1
    engine = Engine(model, progress=False, prefix_caching=cached, image_cache_bytes=bytes_kept)
    return EngineAsker(engine, "")


def measure(model: str | None, data: Path, kind: str, samples: int) -> None:
    """Measure one kind, each way in turns, and print it."""
    task, style = KINDS[kind]
    asked = questions(data, task, style, samples)
    speeds: dict[str, list[float]] = {"together": [], "one by one": [], "one by one, no caches": []}
    watch = others()
    for _ in range(ROUNDS):
        for way, found in speeds.items():
            list(_asker(model, way).answers(asked[:2]))  # starts the image workers
            asker = _asker(model, way)
            with timed(found, len(asked)):
                if way == "together":
                    answered = sum(1 for _ in asker.answers(asked))
                else:
                    answered = sum(1 for question in asked for _ in asker.answers([question]))
            if answered != len(asked):
                raise RuntimeError(f"{answered} of {len(asked)} were answered")
    medians = {way: median(found) for way, found in speeds.items()}
    say(
        kind=kind,
        task=task,
        samples=len(asked),
        **{f"{way}, samples/s": value for way, value in medians.items()},
        gain=medians["together"] / medians["one by one"],
        gain_without_caches=medians["together"] / medians["one by one, no caches"],
        other_cores=watch(),
    )


def measure_full_size(engine: Engine, data: Path, kind: str, samples: int) -> None:
    """Ask a large model all questions of a kind together, once, and print it. Pictures of earlier kinds are cached."""
    task, style = KINDS[kind]
    asked, watch, found = questions(data, task, style, samples), others(), list[float]()
    with timed(found, len(asked)):
        answers = list(EngineAsker(engine, "").answers(asked))
    if len(answers) != len(asked):
        raise RuntimeError(f"{len(answers)} of {len(asked)} were answered")
    say(kind=kind, task=task, samples=len(asked), samples_s=found[0], other_cores=watch())


def main() -> None:
    """Measure all kinds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder that tools.nano.datasets writes")
    parser.add_argument("--model", help="checkpoint folder (default: nano)")
    parser.add_argument("--synthetic", metavar="NAME", help="qwen-vl-chat or qwen-vl-chat-int4, of random weights")
    parser.add_argument("--precision", default="fast", choices=PRECISIONS, help="of --synthetic; default: %(default)s")
    parser.add_argument("--samples", type=int, default=200, help="of each kind; default: %(default)s")
    tasks = [task for task, _ in KINDS.values()]
    parser.add_argument("--tasks", nargs="+", default=tasks, choices=tasks, help="default: one of each kind")
    args = parser.parse_args()
    say(**setting())
    engine = Engine(synthetic=args.synthetic, precision=args.precision) if args.synthetic else None
    for kind, (task, _) in KINDS.items():
        if task not in args.tasks:
            continue
        if engine is not None:
            measure_full_size(engine, args.data, kind, args.samples)
        else:
            measure(args.model, args.data, kind, args.samples)


if __name__ == "__main__":
    main()
