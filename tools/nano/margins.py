"""How far the demo's answers are from going wrong: `python -m tools.nano.margins`.

A token of a greedy answer decides when the answer that its runner-up leads to is wrong: the runner-up replaces it, the
model continues greedily, and `tools/nano/scoring.py` judges. The margin of an answer is the smallest distance
in logits between a deciding token and its runner-up. A wrong answer has margin 0. The table has a row for each
instruction set (and plain torch, "reference") and dtype, of every precision and checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from qvl_kernels.cpu import library as cpu_library
from qvl_runtime import Engine, SamplingParams
from qvl_runtime.prompt.chatml import EncodedPrompt

from .dialogue import Turn
from .scoring import Tally, count

PACKAGE = Path(__file__).parent.parent.parent / "qvl_runtime"
CHECKPOINTS, DTYPES, PRECISIONS = ("nano", "nano_int4"), ("bfloat16", "float16", "float32"), ("exact", "fast")
REFERENCE = "reference"
GREEDY = SamplingParams(temperature=0, repetition_penalty=1, max_tokens=120, logprobs=2)


class Margin(NamedTuple):
    """The margin of one answer, at most the limit; `instead` is the text of the nearest wrong answer."""

    right: bool
    margin: float
    answer: str
    instead: str = ""


def right(turn: Turn, reply: str) -> bool:
    """Whether nothing that `tools.eval_nano` counts about the reply is wrong; of boxes an IoU of 0.5 is enough."""
    tally = Tally()
    count(tally, turn, reply)
    return all(tally.right[name] == size for name, size in tally.sizes.items() if not name.endswith(">= 0.9"))


def margin(engine: Engine, image: Image.Image, turn: Turn, limit: float = math.inf) -> Margin:
    """The margin of the engine's answer to the turn's question about the image, looked for below `limit`."""
    message = {"role": "user", "content": [{"image": image}, {"text": turn.question}]}
    reply = engine.chat([message], GREEDY)
    if not right(turn, reply.text):
        return Margin(False, 0.0, reply.text)
    prompt = engine.encode([message]).prompt
    gaps = []
    for place, token in enumerate(reply.logprobs or ()):
        (_, first), (second, below) = token.top
        gaps.append((first - below, place, second))
    for gap, place, second in sorted(gaps):
        if gap >= limit:
            break
        tokens = [*reply.token_ids[:place], second]
        text = _continued(engine, image, prompt, tokens)
        if not right(turn, text):
            return Margin(True, gap, reply.text, text)
    return Margin(True, limit, reply.text)


def _continued(engine: Engine, image: Image.Image, prompt: EncodedPrompt, tokens: list[int]) -> str:
    """The text of the answer that begins with `tokens`."""
    if tokens[-1] in prompt.stop_ids:
        return engine.tokenizer.decode(tokens[:-1])
    until_stop = replace(GREEDY, stop_token_ids=tuple(prompt.stop_ids), logprobs=None)
    reply = engine.generate([{"token_ids": [*prompt.token_ids, *tokens], "images": [image]}], until_stop)[0]
    return engine.tokenizer.decode(tokens) + reply.text


def demo_turns(folder: Path = PACKAGE / "assets") -> tuple[Image.Image, list[Turn]]:
    """The demo's image, and its three questions with the right answers: demo.json has both."""
    plan = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    answers = plan["answers"]
    kinds = (("caption", "caption_prompt"), (answers["question_kind"], "question"), ("box", "box_prompt"))
    demo = [Turn(kind, plan[name], answers[name]) for kind, name in kinds]
    return Image.open(folder / plan["image"]).convert("RGB"), demo


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Run an instruction set's kernels, or plain torch, for a while."""
    before = os.environ.pop("QVL_KERNELS", None)
    if name == REFERENCE:
        os.environ["QVL_KERNELS"] = REFERENCE
    try:
        with nullcontext() if name == REFERENCE else cpu_library.instruction_set(name):
            yield
    finally:
        os.environ.pop("QVL_KERNELS", None)
        if before is not None:
            os.environ["QVL_KERNELS"] = before


def instruction_sets() -> list[str]:
    """All that this build and CPU have, and plain torch."""
    return [*cpu_library.library().available, REFERENCE]


def variants(sets: Sequence[str]) -> Iterator[tuple[str, str, str, str]]:
    """Instruction set, checkpoint, dtype, precision: every combination.

    Plain torch has no fast precision and runs nano alone: it unpacks Int4 weights at every use, 15 s a variant.
    """
    for name in sets:
        for checkpoint in CHECKPOINTS[: 1 if name == REFERENCE else 2]:
            for dtype in DTYPES:
                for precision in PRECISIONS[: 1 if name == REFERENCE else 2]:
                    yield name, checkpoint, dtype, precision


def measure(
    variant: tuple[str, str, str, str],
    image: Image.Image,
    questions: Sequence[Turn],
    limit: float,
    package: Path = PACKAGE,
) -> list[Margin]:
    """The margin of each turn's answer on one variant."""
    name, checkpoint, dtype, precision = variant
    with instruction_set(name):
        engine = Engine(package / checkpoint, dtype=dtype, precision=precision, max_model_len=512)
        return [margin(engine, image, turn, limit) for turn in questions]


def main() -> None:
    """Print the table, one row for each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, default=PACKAGE, help="folder of nano and nano_int4")
    parser.add_argument("--limit", type=float, default=8.0, help="look no farther, in logits (default: %(default)s)")
    args = parser.parse_args()
    image, questions = demo_turns()
    print("| instruction set | checkpoint | dtype | precision | caption | question | box |\n" + "|---" * 7 + "|")
    for variant in variants(instruction_sets()):
        margins = measure(variant, image, questions, args.limit, args.package)
        cells = [f"{m.margin:.2f}" if m.right else f"wrong: {m.answer}" for m in margins]
        print(f"| {' | '.join([*variant, *cells])} |", flush=True)


if __name__ == "__main__":
    main()
