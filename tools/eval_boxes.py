"""Judge nano's boxes and their scores on fresh scenes, free and held to the grammar; fit the calibration that it ships.

`python -m tools.eval_boxes [--scenes 1000] [--fit 600] [--write]`

Each scene is asked for one thing that is there and for one that is not: a near miss with one attribute changed. The
calibration is fitted on other scenes than those of the table. `--write` replaces the calibration in the checkpoint's
folder and the plots of docs/boxes.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image

from qvl_runtime import Box, Engine, SamplingParams
from qvl_runtime.engine.calibrating import (
    Judged,
    average_precision,
    expected_error,
    fit,
    plot_reliability,
    ranking,
    risk_coverage,
)
from qvl_runtime.engine.engine import NANO, Encoded
from qvl_runtime.engine.locating import overlap
from qvl_runtime.prompt.box_calibration import FILE, BoxCalibration
from qvl_runtime.prompt.box_rules import BoxRules
from tools.nano.scenes import SceneConfig, Thing, check_fonts, draw_scene
from tools.nano.world import COLORS, SHAPES

QUESTION = "Box the {}."
FREE = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=24)
HELD = replace(FREE, boxes=BoxRules(labels="none", quads=False, most=1))
DOCS = Path(__file__).parent.parent / "docs"
SEEDS = {"fit": 20_000_003, "table": 20_000_033}


class Case(NamedTuple):
    """One phrase asked of one scene, and its box, or None if the scene has no such thing."""

    image: Image.Image
    phrase: str
    truth: Box | None


def cases(scenes: int, seed: int, config: SceneConfig) -> list[Case]:
    """A thing that is there and one that is not, for each scene."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(scenes):
        pixels, things = draw_scene(rng, config)
        image, thing = Image.fromarray(pixels), things[int(rng.integers(len(things)))]
        found.append(Case(image, thing.name(), Box(thing.name(), *thing.box_1000())))
        found.append(Case(image, _absent(rng, things), None))
    return found


def _absent(rng: Generator, things: Sequence[Thing]) -> str:
    """A name that no thing has, by changing the color or the shape of one that is there, or of any."""
    names = {thing.name() for thing in things}
    shapes = [thing for thing in things if thing.color in COLORS]
    while True:
        color, kind = list(COLORS)[rng.integers(len(COLORS))], list(SHAPES)[rng.integers(len(SHAPES))]
        if shapes:
            like = shapes[int(rng.integers(len(shapes)))]
            color, kind = (color, like.kind) if rng.random() < 0.5 else (like.color, kind)
        if (name := f"{color} {kind}") not in names:
            return name


def answers(engine: Engine, asked: Sequence[Case], params: SamplingParams) -> Iterator[Judged | None]:
    """The first box of each answer that begins with the phrase's label, and its overlap; None without a box."""
    tokens = engine.tokenizer
    for start in range(0, len(asked), 64):
        requests = []
        for case in asked[start : start + 64]:
            parts = [{"type": "image", "image": case.image}, {"type": "text", "text": QUESTION.format(case.phrase)}]
            prompt = engine.encode([{"role": "user", "content": parts}]).prompt
            label = [tokens.ref_start, *tokens.encode(case.phrase, "none"), tokens.ref_end]
            whole = replace(prompt, token_ids=[*prompt.token_ids, *label])
            requests.append(engine.submit(Encoded(whole, 0.0), params))
        while not all(request.done for request in requests):
            engine.core.step()
        for case, request in zip(asked[start : start + 64], requests, strict=True):
            boxes = request.completion().boxes
            right = 0.0 if case.truth is None or not boxes else overlap(boxes[0], case.truth)
            yield Judged(boxes[0], right) if boxes else None


def table(name: str, asked: Sequence[Case], found: Sequence[Judged | None], calibration: BoxCalibration) -> list[str]:
    """The rows of one column: a name and a number each."""
    there = [one for case, one in zip(asked, found, strict=True) if case.truth is not None]
    overlaps = [0.0 if one is None else one.iou for one in there]
    judged = [one for one in found if one is not None and one.box.details is not None]
    right = [one.iou >= 0.5 for one in judged]
    scores = by_score(judged, calibration)
    present = [one for one in there if one is not None and one.box.details is not None]
    close = [one.iou >= 0.9 for one in present]
    rows = {
        "boxes without an error of form": f"{sum(one is not None for one in found)} of {len(found)}",
        "accuracy at IoU 0.5": f"{np.mean([o >= 0.5 for o in overlaps]):.3f}",
        "accuracy at IoU 0.9": f"{np.mean([o >= 0.9 for o in overlaps]):.3f}",
        "mean IoU": f"{np.mean(overlaps):.4f}",
        "AP at IoU 0.5, by `confidence`": f"{average_precision(scores['confidence'], right, len(there)):.4f}",
        "ECE of `confidence`": f"{expected_error(scores['confidence'], right):.4f}",
        "ECE of `score` taken for a probability": f"{expected_error(scores['score'], right):.4f}",
    }
    for label, values in scores.items():
        coverage, risk = risk_coverage(values, right)
        area = float(((risk[1:] + risk[:-1]) / 2 * np.diff(coverage)).sum())
        among = ranking(by_score(present, calibration)[label], close)
        rows[
            f"`{label}`: AUROC of right boxes; of IoU 0.9 among things that are there; area under risk and coverage"
        ] = f"{ranking(values, right):.4f}; {among:.4f}; {area:.4f}"
    print(f"\n{name}")
    for label, value in rows.items():
        print(f"| {label} | {value} |")
    return list(rows.values())


def by_score(judged: Sequence[Judged], calibration: BoxCalibration) -> dict[str, list[float]]:
    """The boxes' values of each score, the higher the better."""
    found: dict[str, list[float]] = {}
    for one in judged:
        if (details := one.box.details) is None:
            continue
        for label, value in (
            ("score", one.box.score or 0.0),
            ("normalized", details.normalized),
            ("presence", details.presence),
            ("spread", -float(np.mean(details.spread))),
            ("confidence", calibration.confidence(details)),
        ):
            found.setdefault(label, []).append(value)
    return found


def main() -> None:
    """Fit, measure, print the table, and write the calibration and plots with `--write`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=NANO, help="checkpoint folder (default: the shipped one)")
    parser.add_argument("--scenes", type=int, default=1000, help="of the table; default: %(default)s")
    parser.add_argument("--fit", type=int, default=600, help="scenes to fit on; default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--write", action="store_true", help="replace the calibration and the plots")
    args = parser.parse_args()
    check_fonts()
    torch.set_num_threads(args.threads)
    began = time.perf_counter()
    engine = Engine(args.model, max_model_len=512)
    config = SceneConfig(side=engine.config.visual.image_size)
    judged = answers(engine, cases(args.fit, SEEDS["fit"], config), HELD)
    dice = np.random.default_rng(0)
    learned = [one for one in judged if one is not None]
    calibration = fit([learned[i] for i in dice.permutation(len(learned))], question=QUESTION)
    print(json.dumps(calibration.to_dict()))
    asked = cases(args.scenes, SEEDS["table"], config)
    free, held = (list(answers(engine, asked, params)) for params in (FREE, HELD))
    for name, found in (("free", free), ("held to the grammar", held)):
        table(name, asked, found, calibration)
    same = sum(a is not None and b is not None and a.box == b.box for a, b in zip(free, held, strict=True))
    print(f"\nthe same box free and held: {same} of {len(asked)}; {time.perf_counter() - began:.0f} s")
    if args.write:
        (args.model / FILE).write_text(json.dumps(calibration.to_dict(), indent=1) + "\n", "utf-8")
        plot([one for one in held if one is not None], calibration)


def plot(held: Sequence[Judged], calibration: BoxCalibration) -> None:
    """Reliability of the confidence, and risk against coverage by each score."""
    from matplotlib import pyplot

    scored = [one for one in held if one.box.details is not None]
    right, scores = [one.iou >= 0.5 for one in scored], by_score(scored, calibration)
    error = expected_error(scores["confidence"], right)
    title = f"nano, {len(scored)} boxes, ECE {error:.3f}"
    plot_reliability(scores["confidence"], right, str(DOCS / "boxes_reliability.png"), title)
    figure, axes = pyplot.subplots(figsize=(5.6, 4), layout="constrained")
    for label, values in scores.items():
        axes.plot(*risk_coverage(values, right), label=label)
    axes.set(xlabel="coverage: share of boxes kept", ylabel="risk: share of these that is wrong", xlim=(0, 1))
    axes.legend()
    figure.savefig(DOCS / "boxes_risk.png", dpi=120)


if __name__ == "__main__":
    main()
