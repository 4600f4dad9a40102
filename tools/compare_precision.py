"""Compare precisions with float32: `python -m tools.compare_precision [FOLDER ...]` (default: nano and nano_int4).

Each checkpoint answers prompts of random tokens and a random image greedily in float32, exactly; then every
other precision scores the tokens of those answers. Compared over the answers' tokens: the logits (root mean
square of the difference over that of the logits about their mean), the Kullback-Leibler divergence of the next-token
distributions in nats, and how often the likeliest token is the same. Writes a Markdown table.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from qvl_runtime import Engine, SamplingParams
from tools.eval_nano import PACKAGE

COMPARED: Mapping[str, dict[str, Any]] = {
    "bfloat16, exact": {"dtype": "bfloat16"},
    "float16, exact": {"dtype": "float16"},
    "float32, fast": {"dtype": "float32", "precision": "fast"},
    "bfloat16, fast": {"dtype": "bfloat16", "precision": "fast"},
    "float32, exact, int8 KV": {"dtype": "float32", "kv_dtype": "int8"},
    "bfloat16, fast, int8 KV": {"dtype": "bfloat16", "precision": "fast", "kv_dtype": "int8"},
}
LENGTHS = (20, 60, 120)  # tokens of the prompts' text
SEED = 7


class Loss(NamedTuple):
    """How far one precision is from float32, over all compared tokens."""

    error: float  # of the logits, relative
    kl: float  # nats a token
    agreement: float  # share of tokens whose likeliest is the same
    tokens: int


class Answered(NamedTuple):
    """A prompt with the greedy answer behind it, whose `length` tokens are compared."""

    prompt: dict[str, Any]
    length: int


def prompts(engine: Engine, count: int) -> Iterator[dict[str, Any]]:
    """Random text, every other one around an image of random patches."""
    rng, visual = np.random.default_rng(SEED), engine.config.visual
    span = [visual.image_start_id, *[visual.image_pad_id] * visual.n_queries, visual.image_end_id]
    for number in range(count):
        ids = rng.integers(0, visual.image_start_id, LENGTHS[number % len(LENGTHS)]).tolist()
        patches = np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((32, 32, 1))).astype(np.uint8)
        if number % 2:
            yield {"token_ids": ids[:5] + span + ids[5:], "images": [Image.fromarray(patches)]}
        else:
            yield {"token_ids": ids, "images": []}


def answered(engine: Engine, count: int, tokens: int) -> list[Answered]:
    """Answer `count` prompts greedily, `tokens` tokens each."""
    questions = list(prompts(engine, count))
    greedy = SamplingParams(max_tokens=tokens, temperature=0, repetition_penalty=1, ignore_eos=True)
    answers = engine.generate(questions, greedy)
    return [
        Answered({**prompt, "token_ids": prompt["token_ids"] + list(answer.token_ids)}, len(answer.token_ids))
        for prompt, answer in zip(questions, answers, strict=True)
    ]


def logits_of(engine: Engine, answers: Sequence[Answered], what: str) -> list[Tensor]:
    """Float32 [answer, vocab] of each prompt: the predictions of the tokens of its answer."""
    logits_by_answer = []
    for prompt, length in track(answers, description=what, console=Console(stderr=True)):
        logits = engine.score(prompt, return_logits=True).logits
        if logits is None:
            raise RuntimeError("score returned no logits, though return_logits was set")
        logits_by_answer.append(logits[-length - 1 : -1])
    return logits_by_answer


def loss(reference: Sequence[Tensor], logits: Sequence[Tensor]) -> Loss:
    """Compare logits [tokens, vocab] with the float32 ones in `reference`."""
    p, q = torch.cat(list(reference)).double(), torch.cat(list(logits)).double()
    error = (q - p).square().mean().sqrt() / (p - p.mean(-1, keepdim=True)).square().mean().sqrt()
    kl = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()
    same = (p.argmax(-1) == q.argmax(-1)).double().mean()
    return Loss(float(error), float(kl), float(same), len(p))


def compare(folder: Path, count: int, tokens: int) -> dict[str, Loss]:
    """The losses of a checkpoint by precision."""
    engine = Engine(folder, dtype="float32", max_model_len=2048)
    answers = answered(engine, count, tokens)
    reference = logits_of(engine, answers, f"{folder.name}: float32")
    return {
        name: loss(
            reference, logits_of(Engine(folder, max_model_len=2048, **options), answers, f"{folder.name}: {name}")
        )
        for name, options in COMPARED.items()
    }


def main() -> None:
    """Print a Markdown table, one row for each checkpoint and precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", default=[PACKAGE / "nano", PACKAGE / "nano_int4"])
    parser.add_argument("--prompts", type=int, default=24, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer (default: %(default)s)")
    args = parser.parse_args()
    print("| checkpoint | precision | error of the logits | KL, nats | same likeliest token |\n|---|---|---|---|---|")
    for folder in args.folders:
        for name, losses in compare(folder, args.prompts, args.tokens).items():
            cells = (folder.name, name, f"{losses.error:.2%}", f"{losses.kl:.5f}", f"{losses.agreement:.2%}")
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
