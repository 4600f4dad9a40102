"""Fine-tune nano on a kind of object that it was never shown: its data, and scores before and after.

`python -m tools.nano.new_kind data FOLDER` writes train.json and test.json: scenes with mushrooms, and as many of
nano's own world, without which a fine-tuned model forgets it. `... score [--adapter DIR] [MODEL]` asks about fresh
scenes of both kinds. docs/finetuning.md has the commands of the runs and their results.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from qvl_runtime import Engine, SamplingParams
from qvl_runtime.evaluate.metrics.boxes import iou
from qvl_runtime.prompt.boxes import parse_boxes

from .dialogue import BOX, EXISTS, Turn, grounded, turns
from .scenes import SceneConfig, Thing, check_fonts, draw_scene
from .scoring import score
from .world import NEW_EMOJI

DATA_SEED, SCORE_SEED = 30_000_001, 30_000_003
TRAIN, TEST, SCORED = 1200, 32, 200  # scenes
NAME = next(iter(NEW_EMOJI))


def write_data(folder: Path, train: int = TRAIN, test: int = TEST) -> None:
    """Write train.json and test.json with their images; every second scene has a chance of the new kind."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, usual = np.random.default_rng(DATA_SEED), SceneConfig()
    records = []
    for number in range(train + test):
        image, things = draw_scene(rng, replace(usual, new=0.5) if number % 2 else usual)
        Image.fromarray(image).save(folder / f"{number}.png")
        messages: list[dict[str, str]] = []
        for turn in [*_about_new(rng, things), *_shuffled(rng, turns(rng, things, chinese=number % 8 == 0))]:
            heading = "" if messages else f"Picture 1: <img>{number}.png</img>\n"
            messages += [
                {"from": "user", "value": heading + turn.question},
                {"from": "assistant", "value": turn.answer},
            ]
        records.append({"id": f"scene_{number}", "conversations": messages})
    for name, part in (("train.json", records[:train]), ("test.json", records[train:])):
        (folder / name).write_text(json.dumps(part, ensure_ascii=False, indent=1), encoding="utf-8")


def _about_new(rng: np.random.Generator, things: list[Thing]) -> list[Turn]:
    """The new kind asked for by name, in half of the scenes first: whether it is there, or where."""
    present = [thing for thing in things if thing.kind == NAME]
    asked = EXISTS[False][int(rng.integers(len(EXISTS[False])))].format(NAME)
    there = Turn("exists", asked, "yes" if present else "no")
    where = [Turn("box", BOX[False][int(rng.integers(len(BOX[False])))].format(NAME), grounded(t)) for t in present]
    return [*where, there] if rng.random() < 0.5 else []


def _shuffled(rng: np.random.Generator, items: list[Turn]) -> list[Turn]:
    return [items[int(i)] for i in rng.permutation(len(items))]


def score_new(engine: Engine, params: SamplingParams, scenes: int = SCORED) -> dict[str, float]:
    """How the new kind is found by name, named in captions, boxed, and missed where it is not."""
    rng, counts = np.random.default_rng(SCORE_SEED), dict[str, list[bool]]()
    with_new, without = replace(SceneConfig(), new=1.0, plate=0.0, least=1, most=1), SceneConfig(least=2)
    prompts, cases = [], []
    for number in range(scenes):
        image, things = draw_scene(rng, replace(with_new, most=3, new=0.6) if number % 2 else without)
        for question in ("Generate the caption in English with grounding:", f"Box the {NAME}.", f"Is there a {NAME}?"):
            prompts.append([{"role": "user", "content": [{"image": image}, {"text": question}]}])
            cases.append((question, next((t for t in things if t.kind == NAME), None)))
    replies = [
        c.text for start in range(0, len(prompts), 60) for c in engine.generate(prompts[start : start + 60], params)
    ]
    for (question, thing), reply in zip(cases, replies, strict=True):
        boxes = {box.label: (box.x1, box.y1, box.x2, box.y2) for box in parse_boxes(reply)}
        if question.startswith("Is"):
            counts.setdefault("is there", []).append(reply == ("no" if thing is None else "yes"))
        elif thing is not None:
            sort = "caption" if question.startswith("Gen") else "box"
            counts.setdefault(f"{sort}: named", []).append(NAME in boxes)
            right = NAME in boxes and iou(boxes[NAME], thing.box_1000()) >= 0.5
            counts.setdefault(f"{sort}: named and IoU >= 0.5", []).append(right)
    return {name: sum(own) / len(own) for name, own in counts.items()}


def score_rest(engine: Engine, params: SamplingParams, scenes: int = SCORED) -> dict[str, float]:
    """Nano's usual scores on scenes without the new kind."""

    def ask(images: np.ndarray, which: object, questions: object) -> list[str]:
        pairs = list(zip(which, questions, strict=True))  # type: ignore[call-overload]
        prompts = [[{"role": "user", "content": [{"image": images[i]}, {"text": q}]}] for i, q in pairs]
        return [c.text for at in range(0, len(prompts), 60) for c in engine.generate(prompts[at : at + 60], params)]

    tally = score(ask, SceneConfig(), scenes)
    right, size = sum(tally.right.values()), sum(tally.sizes.values())
    return {"all answers": right / size, **tally.rates}


def main() -> None:
    """Write the data, or print the scores of a model as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    data = commands.add_parser("data", help="write train.json and test.json")
    data.add_argument("folder", type=Path)
    scoring = commands.add_parser("score", help="score a model or an adapter")
    scoring.add_argument("model", type=Path, nargs="?", help="default: the shipped checkpoint")
    scoring.add_argument("--adapter", type=Path, help="a LoRA adapter for it")
    scoring.add_argument("--scenes", type=int, default=SCORED, help="of each sort (default: %(default)s)")
    args = parser.parse_args()
    check_fonts()
    if args.command == "data":
        write_data(args.folder)
        return
    adapters = None if args.adapter is None else {"own": args.adapter}
    engine = Engine(args.model, adapters=adapters, max_model_len=1024)
    params = SamplingParams(temperature=0, max_tokens=120, adapter="own" if adapters else None)
    scores = {"new": score_new(engine, params, args.scenes), "rest": score_rest(engine, params, args.scenes)}
    print(json.dumps({kind: {k: round(v, 4) for k, v in own.items()} for kind, own in scores.items()}, indent=1))


if __name__ == "__main__":
    main()
