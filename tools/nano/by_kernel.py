"""Box on request by instruction set and dtype: `python -m tools.nano.by_kernel [--scenes 500]`.

Asks the box questions of `tools.eval_nano`'s scenes (the same seeds) on every
instruction set of this build and CPU, on plain torch, and at every dtype, and writes a Markdown table: percent with an
IoU of at least 0.5. Every row answers the same questions, so the differences from float32 are paired: the last column
counts the boxes that only the row's dtype and that only float32 gets right.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from qvl_runtime import Engine

from .asking import ask
from .dialogue import Turn, turns
from .margins import DTYPES, PACKAGE, instruction_set, instruction_sets, right
from .scenes import SceneConfig, check_fonts, draw_scene
from .scoring import EVALUATION_SEED


def box_questions(scenes: int, chinese: bool) -> tuple[np.ndarray, list[Turn]]:
    """Images [scenes, side, side, 3] and the box question of each: those that `tools.eval_nano` asks."""
    rng, images, questions = np.random.default_rng(EVALUATION_SEED), [], []
    for _ in range(scenes):
        image, things = draw_scene(rng, SceneConfig())
        images.append(image)
        questions.append(next(t for t in turns(rng, things, chinese) if t.sort == "box"))
    return np.stack(images), questions


def answered(
    folder: Path, name: str, dtype: str, precision: str, images: np.ndarray, questions: Sequence[Turn]
) -> list[bool]:
    """Which of the boxes are right, on one instruction set at one dtype."""
    with instruction_set(name):
        engine = Engine(folder, dtype=dtype, precision=precision, max_model_len=512)
        replies = ask(engine, images, range(len(images)), [turn.question for turn in questions])
    return [right(turn, reply) for turn, reply in zip(questions, replies, strict=True)]


def row(name: str, dtype: str, correct: Sequence[bool], exact: Sequence[bool]) -> str:
    """A line of the table; `exact` is what float32 got right on the same instruction set."""
    gained = sum(f and not e for f, e in zip(correct, exact, strict=True))
    lost = sum(e and not f for f, e in zip(correct, exact, strict=True))
    return f"| {name} | {dtype} | {100 * np.mean(correct):.1f} | +{gained} -{lost} |"


def main() -> None:
    """Print the table, one row for each instruction set and dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=PACKAGE / "nano", help="checkpoint folder")
    parser.add_argument("--scenes", type=int, default=500, help="default: %(default)s")
    parser.add_argument("--chinese", action="store_true", help="ask in Chinese")
    parser.add_argument("--precision", default="exact", choices=["exact", "fast"], help="of the kernels")
    parser.add_argument("--sets", nargs="+", help="instruction sets (default: all, and reference)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="write which boxes are right as JSON here")
    args = parser.parse_args()
    check_fonts()
    torch.set_num_threads(args.threads)
    images, questions = box_questions(args.scenes, args.chinese)
    print("| instruction set | dtype | box: IoU >= 0.5 | against float32 |\n|---|---|---|---|")
    correct_by_row = {}
    for name in args.sets or instruction_sets():
        for dtype in reversed(DTYPES):
            correct = answered(args.model, name, dtype, args.precision, images, questions)
            correct_by_row[f"{name} {dtype}"] = correct
            print(row(name, dtype, correct, correct_by_row[f"{name} float32"]), flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(correct_by_row) + "\n")


if __name__ == "__main__":
    main()
