"""Fine-tune nano on a kind of object that it was never shown: its data, and scores before and after.

`python -m tools.nano.new_kind data FOLDER` writes train.json with the new kind, keep.json with as many scenes of nano's
own world, without which a fine-tuned model forgets it, and test.json. `... score [--adapter DIR] [MODEL]` asks about
fresh scenes of both sorts; with `--before FILE`, which `--save FILE` wrote for the model before training, it compares
the two on the same scenes. docs/finetuning.md has the commands of the runs and their results.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from qvl_runtime import Engine, SamplingParams
from qvl_runtime.evaluate.metrics.boxes import iou
from qvl_runtime.prompt.boxes import parse_boxes
from qvl_runtime.prompt.listformat import image_heading
from tools.paired import Ratio, difference, standard_error

from .dialogue import BOX, EXISTS, Turn, grounded, turns
from .scenes import SceneConfig, Thing, check_fonts, draw_scene
from .scoring import Tally, score_each
from .world import NEW_EMOJI

Record: TypeAlias = dict[str, object]  # of a fine-tuning file
DATA_SEED, SCORE_SEED = 30_000_001, 30_000_003
TRAIN, TEST, SCORED, OWN = 1000, 32, 200, 300  # scenes
BOXES = ("box: box IoU >= 0.9", "caption: box IoU >= 0.9")
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


def score_own(engine: Engine, params: SamplingParams, scenes: int = OWN) -> list[Tally]:
    """What is right of the answers about each scene of nano's own world, without the new kind."""

    def ask(images: np.ndarray, which: object, questions: object) -> list[str]:
        pairs = list(zip(which, questions, strict=True))  # type: ignore[call-overload]
        prompts = [[{"role": "user", "content": [{"image": images[i]}, {"text": q}]}] for i, q in pairs]
        return [c.text for at in range(0, len(prompts), 60) for c in engine.generate(prompts[at : at + 60], params)]

    return score_each(ask, SceneConfig(), scenes)


def compare(tallies: Sequence[Tally], before: Sequence[Tally] | None = None) -> dict[str, dict[str, float]]:
    """Percent right by name; with `before`, of the same scenes, the difference from it and its standard error."""
    names = sorted({name for tally in tallies for name in tally.sizes})
    sums = {"all answers": names, "boxes at IoU 0.9, both sorts": BOXES, **{name: [name] for name in names}}
    found = {}
    for label, parts in sums.items():
        one = _ratio(tallies, parts)
        if not one.counts.any():
            continue
        found[label] = {"percent": 100 * one.value}
        if before is not None:
            other = _ratio(before, parts)
            value, error = difference(one, other).value, standard_error(one, other)
            found[label] |= {"difference": 100 * value, "error": 100 * error}
    return found


def _ratio(tallies: Sequence[Tally], names: Sequence[str]) -> Ratio:
    rows = [[sum(part.get(name, 0) for name in names) for part in (tally.right, tally.sizes)] for tally in tallies]
    right, sizes = np.array(rows, float).T
    return Ratio(right, sizes)


def save_tallies(tallies: Sequence[Tally], path: Path) -> None:
    """Write the tally of each scene as JSON."""
    rows = [{name: [tally.right[name], size] for name, size in tally.sizes.items()} for tally in tallies]
    path.write_text(json.dumps(rows) + "\n", encoding="utf-8")


def load_tallies(path: Path) -> list[Tally]:
    """Read what `save_tallies` wrote."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [Tally(*({name: pair[at] for name, pair in row.items()} for at in (0, 1))) for row in rows]


def score_model(args: argparse.Namespace) -> None:
    """Print the scores of a model as JSON."""
    before = None if args.before is None else load_tallies(args.before)
    if before is not None and len(before) != args.own_scenes:
        raise SystemExit(f"{args.before} has {len(before)} scenes: use --own-scenes {len(before)}")
    adapters = None if args.adapter is None else {"own": args.adapter}
    engine = Engine(args.model, adapters=adapters, max_model_len=1024)
    params = SamplingParams(temperature=0, max_tokens=120, adapter="own" if adapters else None)
    tallies = score_own(engine, params, args.own_scenes)
    if args.save is not None:
        save_tallies(tallies, args.save)
    new = {name: 100 * share for name, share in score_new(engine, params, args.kind, args.scenes).items()}
    own = {name: {k: round(v, 2) for k, v in each.items()} for name, each in compare(tallies, before).items()}
    print(json.dumps({"new": {name: round(share, 1) for name, share in new.items()}, "own": own}, indent=1))


def main() -> None:
    """Write the data, or print the scores of a model."""
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
    scoring.add_argument("--scenes", type=int, default=SCORED, help="for the new kind (default: %(default)s)")
    scoring.add_argument("--own-scenes", type=int, default=OWN, help="of nano's own world (default: %(default)s)")
    scoring.add_argument("--save", type=Path, metavar="FILE", help="write what is right in each of nano's own scenes")
    scoring.add_argument("--before", type=Path, metavar="FILE", help="compare with what --save wrote for another model")
    args = parser.parse_args()
    check_fonts()
    if args.command == "data":
        write_data(args.folder, args.kind, args.scenes)
        return
    score_model(args)


if __name__ == "__main__":
    main()
