"""Fine-tune nano on a kind of object that it was never shown: its data, and scores before and after.

`python -m tools.nano.new_kind data FOLDER` writes train.json with the new kind, keep.json with as many scenes of nano's
own world, without which a fine-tuned model forgets it, and test.json. `... score [--adapter DIR] [MODEL]` asks about
fresh scenes of both sorts. docs/finetuning.md has the commands of the runs and their results.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from qvl_runtime import Engine, SamplingParams
from qvl_runtime.evaluate.metrics.boxes import iou
from qvl_runtime.prompt.boxes import parse_boxes
from qvl_runtime.prompt.listformat import image_heading

from .dialogue import BOX, EXISTS, Turn, grounded, turns
from .scenes import SceneConfig, Thing, check_fonts, draw_scene
from .scoring import score
from .world import NEW_EMOJI

Record: TypeAlias = dict[str, object]  # of a fine-tuning file
DATA_SEED, SCORE_SEED = 30_000_001, 30_000_003
TRAIN, TEST, SCORED = 1000, 32, 200  # scenes
TOLD = ("caption", "describe", "box")  # answers that tell of objects


def write_data(folder: Path, kind: str, train: int = TRAIN, test: int = TEST) -> None:
    """Write train.json, keep.json and test.json with their images; each record is one question about one scene.

    Every second scene has a chance of the new kind, and train.json asks what that changes: whether it is there, where,
    a caption and a description. The other scenes are nano's own: keep.json has a caption, a description, a box and
    another question of each, and train.json asks every second one for the new kind, which is not there. test.json has
    the questions of both for `test` more scenes.

    Why not chats: nano mostly saw first turns, and answers later ones less surely, so that chats teach it much that is
    not about the new kind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng, usual = np.random.default_rng(DATA_SEED), SceneConfig()
    learn, keep, held_out = list[Record](), list[Record](), list[Record]()
    for number in range(train + test):
        image, things = draw_scene(rng, replace(usual, new=0.5, new_kind=kind) if number % 2 else usual)
        Image.fromarray(image).save(folder / f"{number}.png")
        own, new = turns(rng, things, chinese=number % 8 < 2), _about_new(rng, things, kind)
        told = [turn for turn in own if turn.sort in TOLD]
        if number % 2:
            chosen, target = [*new, *(turn for turn in told if turn.sort != "box")], learn
        else:
            others = [turn for turn in own if turn.sort not in TOLD]
            chosen, target = [*told, others[int(rng.integers(len(others)))]], keep
            if number % 4 == 0:
                (learn if number < train else held_out).extend(_records(number, new))
        (target if number < train else held_out).extend(_records(number, chosen))
    for name, records in (("train.json", learn), ("keep.json", keep), ("test.json", held_out)):
        (folder / name).write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")


def _records(number: int, asked: list[Turn]) -> list[Record]:
    """A record of each question; the image's heading is that of the engine's own prompts."""
    heading = f"{image_heading(1)}<img>{number}.png</img>\n"
    return [
        {
            "id": f"scene_{number}_{turn.sort}",
            "conversations": [
                {"from": "user", "value": heading + turn.question},
                {"from": "assistant", "value": turn.answer},
            ],
        }
        for turn in asked
    ]


def _about_new(rng: np.random.Generator, things: list[Thing], kind: str) -> list[Turn]:
    """The new kind asked for by name: whether it is there, and where it is."""

    def asked(sort: str, forms: list[str], answer: str) -> Turn:
        return Turn(sort, forms[int(rng.integers(len(forms)))].format(kind), answer)

    present = [thing for thing in things if thing.kind == kind]
    return [
        asked("exists", EXISTS[False], "yes" if present else "no"),
        *(asked("box", BOX[False], grounded(thing)) for thing in present),
    ]


def score_new(engine: Engine, params: SamplingParams, kind: str, scenes: int = SCORED) -> dict[str, float]:
    """How the new kind is found by name, named in captions, boxed, and missed where it is not."""
    rng, counts = np.random.default_rng(SCORE_SEED), dict[str, list[bool]]()
    with_new, without = replace(SceneConfig(), new=0.6, new_kind=kind, plate=0.0), SceneConfig(least=2)
    prompts, cases = [], []
    for number in range(scenes):
        image, things = draw_scene(rng, with_new if number % 2 else without)
        for question in ("Generate the caption in English with grounding:", f"Box the {kind}.", f"Is there a {kind}?"):
            prompts.append([{"role": "user", "content": [{"image": image}, {"text": question}]}])
            cases.append((question, next((t for t in things if t.kind == kind), None)))
    replies = [
        c.text for start in range(0, len(prompts), 60) for c in engine.generate(prompts[start : start + 60], params)
    ]
    for (question, thing), reply in zip(cases, replies, strict=True):
        boxes = {box.label: (box.x1, box.y1, box.x2, box.y2) for box in parse_boxes(reply)}
        if question.startswith("Is"):
            counts.setdefault("is there", []).append(reply == ("no" if thing is None else "yes"))
        elif thing is not None:
            sort = "caption" if question.startswith("Gen") else "box"
            counts.setdefault(f"{sort}: named", []).append(kind in boxes)
            right = kind in boxes and iou(boxes[kind], thing.box_1000()) >= 0.5
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
    parser.add_argument("--kind", default=next(iter(NEW_EMOJI)), choices=list(NEW_EMOJI), help="default: %(default)s")
    commands = parser.add_subparsers(required=True, dest="command")
    data = commands.add_parser("data", help="write train.json, keep.json and test.json")
    data.add_argument("folder", type=Path)
    data.add_argument(
        "--scenes", type=int, default=TRAIN, help="of train.json and keep.json together (default: %(default)s)"
    )
    scoring = commands.add_parser("score", help="score a model or an adapter")
    scoring.add_argument("model", type=Path, nargs="?", help="default: the shipped checkpoint")
    scoring.add_argument("--adapter", type=Path, help="a LoRA adapter for it")
    scoring.add_argument("--scenes", type=int, default=SCORED, help="of each sort (default: %(default)s)")
    args = parser.parse_args()
    check_fonts()
    if args.command == "data":
        write_data(args.folder, args.kind, args.scenes)
        return
    adapters = None if args.adapter is None else {"own": args.adapter}
    engine = Engine(args.model, adapters=adapters, max_model_len=1024)
    params = SamplingParams(temperature=0, max_tokens=120, adapter="own" if adapters else None)
    scores = {"new": score_new(engine, params, args.kind, args.scenes), "rest": score_rest(engine, params, args.scenes)}
    print(json.dumps({kind: {k: round(v, 4) for k, v in own.items()} for kind, own in scores.items()}, indent=1))


if __name__ == "__main__":
    main()
