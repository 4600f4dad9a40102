"""GPTQ against round to nearest on nano: `python -m tools.compare_quantization [--scenes 600] [--groups 32 128]`.

Nano's float checkpoint is quantized each way, and compared with itself on scenes that training never draws, all in
float32. Over the expected answers of `--kl-scenes` scenes: the Kullback-Leibler divergence of its next-token
distributions, in nats a token, how often the likeliest token is the same, and the loss of the expected tokens. Where
`--scenes` is not 0: the scores of `tools.eval_nano`, and how many answers are word for word those of the float
checkpoint. Calibrated on the set that comes with qvl, and on `--own` scenes of nano's world from seeds of their own,
written as a file in Qwen-VL's fine-tuning format. The gain of GPTQ over round to nearest is listed with its confidence
interval (`tools/paired.py`). Writes two tables as Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

from qvl_runtime import Engine
from qvl_runtime.quantize.options import QuantizeOptions
from qvl_runtime.quantize.quantizer import Quantizer
from tools.eval_nano import PACKAGE
from tools.nano.asking import ask
from tools.nano.conversations import write_conversations
from tools.nano.dialogue import turns
from tools.nano.scenes import SceneConfig, check_fonts, draw_scene
from tools.nano.scoring import EVALUATION_SEED, Tally, score_each
from tools.paired import Difference, Ratio, difference

KL_SEED = 10_000_103
NEAREST = "nearest"
TASKS = (
    "questions, all",
    "caption: object recalled",
    "caption: box IoU >= 0.5",
    "box: box IoU >= 0.5",
    "number: whole",
    "describe",
    "word",
)
TIGHT = ("caption: box IoU >= 0.9", "box: box IoU >= 0.9")


class Figures(NamedTuple):
    """The figures of one quantized checkpoint, scene by scene."""

    kl: Ratio  # nats a token
    same: Ratio  # tokens whose likeliest is the same
    loss: Ratio  # nats a token, - log p of what is right
    answers: Answers | None
    error: float  # of a linear's outputs, mean of all


class Answers(NamedTuple):
    """What was answered in the evaluation, in English."""

    tallies: list[Tally]  # a scene each
    scenes: list[int]  # which each reply is about
    replies: list[str]

    @classmethod
    def of(cls, folder: Path, scenes: int, seed: int) -> Answers:
        """Ask the checkpoint all questions about `scenes` scenes that are drawn from `seed`."""
        engine, collected = Engine(folder, dtype="float32", max_model_len=1024), cls([], [], [])

        def answer(images: NDArray[np.uint8], which: Sequence[int], questions: Sequence[str]) -> list[str]:
            collected.replies[:] = ask(engine, images, which, questions)
            collected.scenes[:] = which
            return collected.replies

        collected.tallies[:] = score_each(answer, SceneConfig(side=engine.config.visual.image_size), scenes, seed)
        return collected

    def rate(self, *tasks: str) -> Ratio:
        """Right answers, of all to some tasks together."""
        right, sizes = (
            np.array([sum(counts.get(task, 0) for task in tasks) for counts in each], np.float64)
            for each in ([t.right for t in self.tallies], [t.sizes for t in self.tallies])
        )
        return Ratio(right, sizes)

    def same_as(self, other: Answers) -> Ratio:
        """Replies that are those of another checkpoint."""
        same = [one == its for one, its in zip(self.replies, other.replies, strict=True)]
        return Ratio(np.bincount(self.scenes, same).astype(np.float64), np.bincount(self.scenes).astype(np.float64))


class Questions(NamedTuple):
    """Prompts that end with the expected answer, and what the float checkpoint says along these."""

    scenes: list[int]  # which each is about
    prompts: list[dict[str, Any]]
    answers: list[torch.Tensor]  # int64 [tokens]
    logprobs: list[torch.Tensor]  # float32 [tokens of the answer, vocabulary]

    @classmethod
    def ask_all(cls, exact: Engine, scenes: int) -> Questions:
        """All questions about `scenes` images, every third in Chinese."""
        rng, questions, tokens = np.random.default_rng(KL_SEED), cls([], [], [], []), exact.tokenizer
        for number in track(range(scenes), description="asking the float checkpoint"):
            image, things = draw_scene(rng, SceneConfig(side=exact.config.visual.image_size))
            for turn in turns(rng, things, chinese=number % 3 == 2):
                question = exact.encode([{"role": "user", "content": [{"image": image}, {"text": turn.question}]}])
                answer = [*tokens.encode(turn.answer), tokens.im_end]
                prompt = {"token_ids": question.prompt.token_ids + answer, "images": [image]}
                questions.scenes.append(number)
                questions.prompts.append(prompt)
                questions.answers.append(torch.tensor(answer))
                questions.logprobs.append(_logprobs(exact, prompt, len(answer)))
        return questions

    def compare(self, other: Engine | None) -> tuple[Ratio, Ratio, Ratio]:
        """Divergence of another checkpoint from the float one, how often they agree, and its loss; None: itself."""
        sums: NDArray[np.float64] = np.zeros((4, max(self.scenes) + 1))  # nats, agreements, nats, tokens
        expected = zip(self.scenes, self.prompts, self.answers, self.logprobs, strict=True)
        for scene, prompt, answer, p in track(expected, description="comparing", total=len(self.prompts)):
            q = p if other is None else _logprobs(other, prompt, len(p))
            sums[0, scene] += float((p.double().exp() * (p.double() - q.double())).sum())
            sums[1, scene] += int((p.argmax(-1) == q.argmax(-1)).sum())
            sums[2, scene] -= float(q.double().gather(-1, answer[:, None]).sum())
            sums[3, scene] += len(p)
        kl, same, loss = (Ratio(each, sums[3]) for each in sums[:3])
        return kl, same, loss


def _logprobs(engine: Engine, prompt: dict[str, Any], answer: int) -> torch.Tensor:
    logits = engine.score(prompt, return_logits=True).logits
    if logits is None:
        raise RuntimeError("score returned no logits, though return_logits was set")
    return logits[-answer - 1 : -1].log_softmax(-1)


def variants(groups: Sequence[int], bits: int) -> Iterator[tuple[str, QuantizeOptions, bool]]:
    """The variants: name, options, and whether it is calibrated on nano's own world; nearest before the others."""
    for group in groups:
        for asym in (False, True):
            kind: dict[str, Any] = {"bits": bits, "group_size": group, "sym": not asym}
            grid = f"groups of {group}, {'asymmetric' if asym else 'symmetric'}"
            yield f"{grid}: {NEAREST}", QuantizeOptions(method="rtn", **kind), False
            yield f"{grid}: GPTQ, built-in set", QuantizeOptions(**kind), False
            yield f"{grid}: GPTQ, own scenes", QuantizeOptions(**kind), True
            if not asym:
                yield f"{grid}: GPTQ, own scenes, drift 0", QuantizeOptions(drift=0.0, **kind), True
                for order in ("none", "full"):
                    yield f"{grid}: GPTQ, own scenes, order {order}", QuantizeOptions(order=order, **kind), True


def main() -> None:
    """Quantize every variant, compare it with the float checkpoint, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=PACKAGE / "nano", help="float checkpoint (default: nano)")
    parser.add_argument("--groups", type=int, nargs="+", default=[32, 128], help="default: %(default)s")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--scenes", type=int, default=0, help="scenes that tasks are scored on (default: none)")
    parser.add_argument("--seed", type=int, default=EVALUATION_SEED, help="of these scenes (default: %(default)s)")
    parser.add_argument("--kl-scenes", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--own", type=int, default=64, help="scenes to calibrate on (default: %(default)s)")
    parser.add_argument("--only", nargs="+", help="only variants whose name ends so")
    args = parser.parse_args()
    check_fonts()
    exact = Engine(args.model, dtype="float32", max_model_len=1024)
    questions = Questions.ask_all(exact, args.kl_scenes)
    own_answers = Answers.of(args.model, args.scenes, args.seed) if args.scenes else None
    own_loss = questions.compare(None)[2]
    figures: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as name:
        own = write_conversations(Path(name) / "own", args.own, exact.config.visual.image_size)
        for number, (variant, options, on_own) in enumerate(variants(args.groups, args.bits)):
            if args.only and not variant.endswith(tuple(args.only)):
                continue
            made = Path(name) / str(number)
            errors = Quantizer.open(args.model, made, options, own if on_own else None).run()
            kl, same, loss = questions.compare(Engine(made, dtype="float32", max_model_len=1024))
            error = sum(error.error for error in errors) / len(errors)
            answers = Answers.of(made, args.scenes, args.seed) if args.scenes else None
            figures[variant] = Figures(kl, same, loss, answers, error)
            print(variant, *(f"{one:.5f}" for one in (kl.value, same.value, loss.value, error)), flush=True)
    print(table(figures, own_loss, own_answers), "", gains(figures, own_answers), sep="\n")


def table(figures: dict[str, Figures], loss: Ratio, own: Answers | None) -> str:
    """Every variant: a Markdown table; `loss`, `own`: those of the float checkpoint."""
    tasks = (*TASKS, *TIGHT) if own is not None else ()
    columns = (*tasks, "same answer") if tasks else ()
    heads = ("", "KL, nats", "same token", "loss, nats", "mean error of a linear", *columns)
    lines = [_row(*heads), "|---" * len(heads) + "|"]
    rates = [f"{100 * own.rate(task).value:.1f}" for task in tasks] + [""] if own is not None else []
    lines.append(_row("not quantized", "", "", f"{loss.value:.5f}", "", *rates))
    for variant, one in figures.items():
        change = one.loss.value - loss.value
        cells = [f"{one.kl.value:.5f}", f"{100 * one.same.value:.2f} %", f"{change:+.5f}", f"{one.error:.4f}"]
        if own is not None and one.answers is not None:
            cells += [f"{100 * one.answers.rate(task).value:.1f}" for task in tasks]
            cells.append(f"{100 * one.answers.same_as(own).value:.2f} %")
        lines.append(_row(variant, *cells))
    return "\n".join(lines)


def gains(figures: dict[str, Figures], own: Answers | None) -> str:
    """The gain of each over round to nearest on the same grid, with its interval: a Markdown table."""
    heads = ("", "KL", "same token, %", "loss", "same answer, %", "right answers, %", "boxes of IoU >= 0.9, %")
    lines = [_row(*heads), "|---" * len(heads) + "|"]
    for variant, one in figures.items():
        base = figures.get(f"{variant.partition(':')[0]}: {NEAREST}")
        if base is None or base is one:
            continue
        cells = [_interval(difference(one.kl, base.kl), 1, 5), _interval(difference(one.same, base.same), 100, 2)]
        cells.append(_interval(difference(one.loss, base.loss), 1, 5))
        if own is not None and one.answers is not None and base.answers is not None:
            cells.append(_interval(difference(one.answers.same_as(own), base.answers.same_as(own)), 100, 2))
            for tasks in (TASKS, TIGHT):
                cells.append(_interval(difference(one.answers.rate(*tasks), base.answers.rate(*tasks)), 100, 2))
        lines.append(_row(variant, *cells))
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _interval(d: Difference, times: float, digits: int) -> str:
    value, low, high = (f"{times * number:+.{digits}f}" for number in d)
    return f"{value} ({low} to {high}){'' if d.certain else ', not certain'}"


if __name__ == "__main__":
    main()
