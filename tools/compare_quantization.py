"""GPTQ against round to nearest on nano: `python -m tools.compare_quantization [--scenes 200] [--groups 32 128]`.

Nano's float checkpoint is quantised each way, and compared with itself on scenes that training never draws: the
Kullback-Leibler divergence of its next-token distributions, in nats a token, over the expected answers of
`--kl-scenes` scenes (both computed in float32), how often the likeliest token is the same, and the scores of
`tools.eval_nano` where `--scenes` is not 0. Calibrated on the set that comes with qvl, and on `--own` scenes of nano's
world from seeds of their own, written as a file in Qwen-VL's fine-tuning format. Writes the table as Markdown.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.progress import track

from qvl_runtime import Engine
from qvl_runtime.weights.quantize import QuantizeOptions, Quantizer
from tools.eval_nano import PACKAGE, evaluate
from tools.nano.dialogue import turns
from tools.nano.scenes import SceneConfig, check_fonts, draw_scene

CALIBRATION_SEED = 20_000_003  # neither training's nor the evaluation's
KL_SEED = 10_000_103
TASKS = ("questions, all", "caption: object recalled", "caption: box IoU >= 0.5", "box: box IoU >= 0.5",
         "number: whole", "describe", "word")  # fmt: skip


class Divergence(NamedTuple):
    kl: float  # nats a token
    agreement: float  # share of tokens whose likeliest is the same


def write_conversations(folder: Path, scenes: int, side: int) -> Path:
    """Scenes with all their questions as a fine-tuning file, each as one conversation of several turns."""
    rng, records = np.random.default_rng(CALIBRATION_SEED), []
    for number in range(scenes):
        picture, things = draw_scene(rng, SceneConfig(side=side))
        Image.fromarray(picture).save(folder / f"{number}.png")
        said: list[dict[str, str]] = []
        for turn in turns(rng, things, chinese=number % 3 == 2):
            heading = "" if said else f"Picture 1: <img>{number}.png</img>\n"
            said += [{"from": "user", "value": heading + turn.question}, {"from": "assistant", "value": turn.answer}]
        records.append({"id": f"scene_{number}", "conversations": said})
    path = folder / "scenes.json"
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def asked(engine: Engine, scenes: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Questions with their expected answers as prompts, and how many of the last tokens are the answer's."""
    rng = np.random.default_rng(KL_SEED)
    tokens = engine.tokenizer
    for number in range(scenes):
        picture, things = draw_scene(rng, SceneConfig(side=engine.config.visual.image_size))
        for turn in turns(rng, things, chinese=number % 3 == 2):
            question = engine.encode([{"role": "user", "content": [{"image": picture}, {"text": turn.question}]}])
            answer = [*tokens.encode(turn.answer), tokens.im_end]
            yield {"token_ids": question.prompt.token_ids + answer, "images": [picture]}, len(answer)


@torch.inference_mode()
def diverge(one: Engine, other: Engine, scenes: int) -> Divergence:
    """How far the answers' distributions of `other` are from those of `one`."""
    kl, same, count = 0.0, 0, 0
    for prompt, length in track(list(asked(one, scenes)), description="comparing"):
        p, q = (
            engine.score(prompt, return_logits=True).logits[-length - 1 : -1].double().log_softmax(-1)
            for engine in (one, other)
        )
        kl += float((p.exp() * (p - q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += length
    return Divergence(kl / count, same / count)


def variants(groups: Sequence[int], bits: int) -> Iterator[tuple[str, QuantizeOptions, bool]]:
    """What is compared: name, options, and whether it is calibrated on nano's own world."""
    for group in groups:
        for asym in (False, True):
            kind: dict[str, Any] = {"bits": bits, "group_size": group, "sym": not asym}
            said = f"groups of {group}, {'asymmetric' if asym else 'symmetric'}"
            yield f"{said}: nearest", QuantizeOptions(method="rtn", **kind), False
            yield f"{said}: GPTQ, built-in set", QuantizeOptions(**kind), False
            yield f"{said}: GPTQ, own scenes", QuantizeOptions(**kind), True
            if not asym:
                for order in ("none", "full"):
                    yield f"{said}: GPTQ, own scenes, order {order}", QuantizeOptions(order=order, **kind), True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=PACKAGE / "nano", help="float checkpoint (default: nano)")
    parser.add_argument("--groups", type=int, nargs="+", default=[32, 128], help="default: %(default)s")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--scenes", type=int, default=0, help="that tasks are scored on; 0: none")
    parser.add_argument("--kl-scenes", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--own", type=int, default=64, help="scenes to calibrate on (default: %(default)s)")
    parser.add_argument("--only", help="only variants whose name holds this")
    args = parser.parse_args()
    check_fonts()
    exact = Engine(args.model, dtype="float32", max_model_len=1024)
    rows = ["| | KL, nats | same token | mean error of a linear | " + " | ".join(TASKS) + " |",
            "|---" * (4 + len(TASKS)) + "|"]  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        own = write_conversations(folder, args.own, exact.config.visual.image_size)
        if args.scenes and not args.only:
            rates = evaluate(args.model, "float32", "exact", args.scenes, False).rates
            rows.append(_row("not quantised", None, None, [rates.get(task) for task in TASKS]))
        for number, (said, options, on_own) in enumerate(variants(args.groups, args.bits)):
            if args.only and args.only not in said:
                continue
            errors = Quantizer.open(args.model, folder / str(number), options, own if on_own else None).run()
            found = diverge(exact, Engine(folder / str(number), dtype="float32", max_model_len=1024), args.kl_scenes)
            rates = {}
            if args.scenes:
                rates = evaluate(folder / str(number), "float32", "exact", args.scenes, False).rates
            mean = sum(error.error for error in errors) / len(errors)
            rows.append(_row(said, found, mean, [rates.get(task) for task in TASKS]))
            print(rows[-1], flush=True)
    print("\n".join(rows))


def _row(said: str, found: Divergence | None, error: float | None, rates: Sequence[float | None]) -> str:
    cells = ["", "", ""] if found is None else [f"{found.kl:.5f}", f"{100 * found.agreement:.2f} %", f"{error:.4f}"]
    cells += ["" if rate is None else f"{100 * rate:.1f}" for rate in rates]
    return f"| {said} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
