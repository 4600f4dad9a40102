"""GPTQ against round to nearest on nano: `python -m tools.compare_quantization [--scenes 1000] [--groups 32 128]`.

Nano's float checkpoint is quantised each way, and compared with itself on scenes that training never draws: the
Kullback-Leibler divergence of its next-token distributions, in nats a token, over the expected answers of
`--kl-scenes` scenes (both computed in float32), how often the likeliest token is the same, and the scores of
`tools.eval_nano` where `--scenes` is not 0. Calibrated on the set that comes with qvl, and on `--own` scenes of nano's
world from seeds of their own, written as a file in Qwen-VL's fine-tuning format. What GPTQ gains over round to nearest
stands beside it with its interval (`tools/paired.py`). Writes two tables as Markdown.
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
from qvl_runtime.weights.quantize import QuantizeOptions, Quantizer
from tools.eval_nano import PACKAGE, ask
from tools.nano.conversations import write_conversations
from tools.nano.dialogue import turns
from tools.nano.scenes import SceneConfig, check_fonts, draw_scene
from tools.nano.scoring import Tally, score_each
from tools.paired import Difference, Ratio, difference

KL_SEED = 10_000_103
NEAREST = "nearest"
TASKS = ("questions, all", "caption: object recalled", "caption: box IoU >= 0.5", "box: box IoU >= 0.5",
         "number: whole", "describe", "word")  # fmt: skip


class Found(NamedTuple):
    """What was found of a checkpoint, scene by scene."""

    kl: Ratio  # nats a token
    same: Ratio  # tokens whose likeliest is the same
    tallies: list[Tally]
    error: float  # of a linear's outputs, mean of all

    def rate(self, *tasks: str) -> Ratio:
        """Of all answers to some tasks together."""
        right, asked = (
            np.array([sum(kept.get(task, 0) for task in tasks) for kept in each], np.float64)
            for each in ([t.right for t in self.tallies], [t.sizes for t in self.tallies])
        )
        return Ratio(right, asked)


class Questions(NamedTuple):
    """Prompts that end with the expected answer, and what the float checkpoint says along these."""

    scenes: list[int]  # which each is about
    prompts: list[dict[str, Any]]
    logprobs: list[torch.Tensor]  # float32 [tokens of the answer, vocabulary]

    @classmethod
    def asked(cls, exact: Engine, scenes: int) -> Questions:
        """All questions about `scenes` pictures, every third in Chinese."""
        rng, found, tokens = np.random.default_rng(KL_SEED), cls([], [], []), exact.tokenizer
        for number in track(range(scenes), description="asking the float checkpoint"):
            picture, things = draw_scene(rng, SceneConfig(side=exact.config.visual.image_size))
            for turn in turns(rng, things, chinese=number % 3 == 2):
                question = exact.encode([{"role": "user", "content": [{"image": picture}, {"text": turn.question}]}])
                answer = [*tokens.encode(turn.answer), tokens.im_end]
                prompt = {"token_ids": question.prompt.token_ids + answer, "images": [picture]}
                found.scenes.append(number)
                found.prompts.append(prompt)
                found.logprobs.append(_logprobs(exact, prompt, len(answer)))
        return found

    def compare(self, other: Engine) -> tuple[Ratio, Ratio]:
        """The divergence of another checkpoint from the float one, and how often they agree."""
        sums: NDArray[np.float64] = np.zeros((3, max(self.scenes) + 1))  # nats, agreements, tokens
        asked = zip(self.scenes, self.prompts, self.logprobs, strict=True)
        for scene, prompt, p in track(asked, description="comparing", total=len(self.prompts)):
            q = _logprobs(other, prompt, len(p))
            sums[0, scene] += float((p.double().exp() * (p.double() - q.double())).sum())
            sums[1, scene] += int((p.argmax(-1) == q.argmax(-1)).sum())
            sums[2, scene] += len(p)
        return Ratio(sums[0], sums[2]), Ratio(sums[1], sums[2])


def _logprobs(engine: Engine, prompt: dict[str, Any], answer: int) -> torch.Tensor:
    logits = engine.score(prompt, return_logits=True).logits
    if logits is None:
        raise RuntimeError("the engine gave no logits, though they were asked for")
    return logits[-answer - 1 : -1].log_softmax(-1)


def variants(groups: Sequence[int], bits: int) -> Iterator[tuple[str, QuantizeOptions, bool]]:
    """What is compared: name, options, and whether it is calibrated on nano's own world; nearest before the others."""
    for group in groups:
        for asym in (False, True):
            kind: dict[str, Any] = {"bits": bits, "group_size": group, "sym": not asym}
            said = f"groups of {group}, {'asymmetric' if asym else 'symmetric'}"
            yield f"{said}: {NEAREST}", QuantizeOptions(method="rtn", **kind), False
            yield f"{said}: GPTQ, built-in set", QuantizeOptions(**kind), False
            yield f"{said}: GPTQ, own scenes", QuantizeOptions(**kind), True
            if not asym:
                for order in ("none", "full"):
                    yield f"{said}: GPTQ, own scenes, order {order}", QuantizeOptions(order=order, **kind), True


def answer_all(folder: Path, scenes: int) -> list[Tally]:
    """The tasks of the evaluation, in English."""
    if not scenes:
        return []
    engine = Engine(folder, dtype="float32", max_model_len=1024)
    config = SceneConfig(side=engine.config.visual.image_size)
    return score_each(lambda *asked: ask(engine, *asked), config, scenes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=PACKAGE / "nano", help="float checkpoint (default: nano)")
    parser.add_argument("--groups", type=int, nargs="+", default=[32, 128], help="default: %(default)s")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--scenes", type=int, default=0, help="that tasks are scored on; 0: none")
    parser.add_argument("--kl-scenes", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--own", type=int, default=64, help="scenes to calibrate on (default: %(default)s)")
    parser.add_argument("--only", nargs="+", help="only variants whose name holds one of these")
    args = parser.parse_args()
    check_fonts()
    exact = Engine(args.model, dtype="float32", max_model_len=1024)
    questions = Questions.asked(exact, args.kl_scenes)
    found: dict[str, Found] = {}
    with tempfile.TemporaryDirectory() as name:
        own = write_conversations(Path(name) / "own", args.own, exact.config.visual.image_size)
        for number, (said, options, on_own) in enumerate(variants(args.groups, args.bits)):
            if args.only and not any(part in said for part in args.only):
                continue
            made = Path(name) / str(number)
            errors = Quantizer.open(args.model, made, options, own if on_own else None).run()
            kl, same = questions.compare(Engine(made, dtype="float32", max_model_len=1024))
            error = sum(error.error for error in errors) / len(errors)
            found[said] = Found(kl, same, answer_all(made, args.scenes), error)
            print(said, f"{kl.value:.5f}", f"{same.value:.4f}", f"{error:.4f}", flush=True)
        if args.scenes and not args.only:
            nothing = Ratio(np.zeros(1), np.ones(1))
            found["not quantised"] = Found(nothing, nothing, answer_all(args.model, args.scenes), 0.0)
    print(table(found), "", gains(found), sep="\n")


def table(found: dict[str, Found]) -> str:
    tasks = TASKS if any(one.tallies for one in found.values()) else ()
    lines = ["| | KL, nats | same token | mean error of a linear | " + " | ".join(tasks) + " |",
             "|---" * (4 + len(tasks)) + "|"]  # fmt: skip
    for said, one in found.items():
        cells = [f"{one.kl.value:.5f}", f"{100 * one.same.value:.2f} %", f"{one.error:.4f}"]
        cells += [f"{100 * one.rate(task).value:.1f}" for task in tasks]
        lines.append(f"| {said} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gains(found: dict[str, Found]) -> str:
    """What each gains over round to nearest on the same grid, with its interval: a Markdown table."""
    lines = ["| | KL | same token, % | tasks together, % |", "|---|---|---|---|"]
    for said, one in found.items():
        base = found.get(f"{said.partition(':')[0]}: {NEAREST}")
        if base is None or base is one:
            continue
        cells = [_said(difference(one.kl, base.kl), 1, 5), _said(difference(one.same, base.same), 100, 2)]
        cells.append(_said(difference(one.rate(*TASKS), base.rate(*TASKS)), 100, 2) if one.tallies else "")
        lines.append(f"| {said} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _said(d: Difference, times: float, digits: int) -> str:
    value, low, high = (f"{times * number:+.{digits}f}" for number in d)
    return f"{value} ({low} to {high}){'' if d.certain else ', not certain'}"


if __name__ == "__main__":
    main()
