"""Write nano's scenes in the form of every data set of `qvl evaluate`: `python -m tools.nano.datasets FOLDER`.

The scenes, their questions and their answers are those of `tools.eval_nano`: the same seed, drawn in the same order.
The folder is what `--data` wants. Gold answers score exactly 100 in each.
"""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from qvl_runtime.evaluate.readers.dialogues import SUBTASKS

from .dialogue import DESCRIBE, EXISTS, Turn, turns
from .scenes import SceneConfig, Thing, check_fonts, draw_scene
from .scoring import EVALUATION_SEED
from .world import COLORS, SHAPES

SHORT = ("count", "color", "shape", "exists", "number", "word")  # questions with an answer of a word
PEOPLE = 10  # who answer each question of VQA


class Scene(NamedTuple):
    """A drawn picture and what is asked about it."""

    image: str  # `data/...`, as the original's files have it, whatever the folder is called
    things: list[Thing]
    turns: list[Turn]

    def of(self, *sorts: str) -> Iterator[Turn]:
        """The questions of these sorts."""
        return (turn for turn in self.turns if turn.sort in sorts)


def write_datasets(folder: Path, count: int, side: int = SceneConfig().side) -> None:
    """Draw `count` scenes of `side` pixels, and write them and all files of questions into a folder.

    The files name images as `data/...`, as the original's do, whatever the folder is called.
    """
    scenes = write_scenes(folder, count, side)
    write_scenes(folder, count, side, chinese=True)
    _captions(folder, scenes)
    _questions(folder, scenes)
    _choices(folder, scenes)
    _boxes(folder, scenes, side)
    _mme(folder, scenes)
    _touchstone(folder, scenes)


def write_scenes(folder: Path, count: int, side: int, chinese: bool = False) -> list[Scene]:
    """Write the scenes and every question about them as scenes/scenes.jsonl, or scenes_zh.jsonl."""
    rng, config, scenes = np.random.default_rng(EVALUATION_SEED), SceneConfig(side=side), []
    name = "scenes_zh" if chinese else "scenes"
    (folder / "scenes" / name).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image, things = draw_scene(rng, config)
        path = f"data/scenes/{name}/{number}.png"
        Image.fromarray(image).save(_place(folder, path))
        scenes.append(Scene(path, things, turns(rng, things, chinese)))
    records = [
        {"image": scene.image, "sort": turn.sort, "question": turn.question, "answer": turn.answer}
        for scene in scenes
        for turn in scene.turns
    ]
    _lines(folder / "scenes" / f"{name}.jsonl", records)
    return scenes


def _captions(folder: Path, scenes: Sequence[Scene]) -> None:
    """Five people's captions of each picture: the things in five orders."""
    images = [{"id": number, "image": scene.image} for number, scene in enumerate(scenes)]
    annotations: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes):
        sentence = next(scene.of("describe")).answer
        for caption in (
            sentence,
            f"{sentence}.",
            f"There is {sentence}.",
            f"A picture of {sentence}",
            sentence.title(),
        ):
            annotations.append({"id": len(annotations), "image_id": number, "caption": caption})
    content = {"images": images, "annotations": annotations, "type": "captions"}
    for name in ("flickr30k/flickr30k_karpathy_test.json", "nocaps/nocaps_val.json"):
        _json(folder / name, content)


def _questions(folder: Path, scenes: Sequence[Scene]) -> None:
    """Short questions as lines, for some sets with ten people's answers, of which one is another.

    People write in lower case, as in the data sets: the VQA score does not lower the case of their answers.
    """
    asked = [(scene, turn) for scene in scenes for turn in scene.of(*SHORT)]
    records = [
        {"image": scene.image, "question": turn.question, "question_id": number, "answer": turn.answer}
        for number, (scene, turn) in enumerate(asked)
    ]
    people = {
        "annotations": [
            {
                "question_id": number,
                "answer_type": {"count": "number", "exists": "yes/no"}.get(turn.sort, "other"),
                "answers": [
                    {"answer": turn.answer.lower() if person else "unknown", "answer_id": person + 1}
                    for person in range(PEOPLE)
                ],
            }
            for number, (_, turn) in enumerate(asked)
        ]
    }
    reading = [r for r, (_, turn) in zip(records, asked, strict=True) if turn.sort in ("number", "word")]
    numbers = {
        half: [r for r, (_, turn) in zip(records, asked, strict=True) if turn.sort == sort]
        for half, sort in (("human", "number"), ("augmented", "count"))
    }
    for name in ("vqav2/vqav2", "okvqa/okvqa", "vizwiz/vizwiz", "textvqa/textvqa"):
        _lines(folder / f"{name}_val.jsonl", [{**record, "answer": None} for record in records])
        _lines(folder / f"{name}_train.jsonl", records)
    for name in ("vqav2/v2_mscoco_val2014", "okvqa/mscoco_val2014", "vizwiz/vizwiz_val", "textvqa/textvqa_val"):
        _json(folder / f"{name}_annotations.json", people)
    secret = [{k: v for k, v in record.items() if k != "answer"} for record in records]
    for name in ("vqav2/vqav2_testdev", "vizwiz/vizwiz_test", "docvqa/test"):
        _lines(folder / f"{name}.jsonl", secret)
    for name in ("gqa/testdev_balanced", "ocrvqa/ocrvqa_val", "ocrvqa/ocrvqa_test", "ai2diagram/test"):
        _lines(folder / f"{name}.jsonl", records)
    several = [{**record, "answer": [f"no {record['answer']}", str(record["answer"]).title()]} for record in reading]
    _lines(folder / "docvqa/val.jsonl", several)
    for half, chosen in numbers.items():
        _lines(folder / f"chartqa/test_{half}.jsonl", chosen)


def _choices(folder: Path, scenes: Sequence[Scene]) -> None:
    """Colors and shapes to choose from: ScienceQA, MMBench with its rotations, and SEED-Bench with frames for video."""
    rng = np.random.default_rng(EVALUATION_SEED)
    lines: list[dict[str, Any]] = []
    seed, rows = [], []
    for number, (scene, turn) in enumerate([(s, t) for s in scenes for t in s.of("color", "shape")]):
        others = [word for word in (COLORS if turn.sort == "color" else SHAPES) if word != turn.answer]
        options = [turn.answer, *(others[int(i)] for i in rng.permutation(len(others))[:3])]
        answer = int(rng.integers(4))
        options[0], options[answer] = options[answer], options[0]
        picture = scene.image
        lines.append({"image": picture, "hint": "", "question": turn.question, "choices": options, "answer": answer})
        seed.append(
            {"question_id": str(number), "prompt": _seed_prompt([picture], turn, options), "answer": "ABCD"[answer]}
        )
        encoded = base64.b64encode(_place(folder, picture).read_bytes())
        for turned in range(4):
            rotated, right = options[turned:] + options[:turned], (answer - turned) % 4
            columns = [number + turned * 1_000_000, "", turn.question, *rotated, "ABCD"[right], encoded.decode()]
            rows.append("\t".join(map(str, columns)))
    _lines(folder / "scienceqa/scienceqa_test_img.jsonl", lines)
    _lines(folder / "seed_bench/image_input.jsonl", seed)
    head = "\t".join(["index", "hint", "question", "A", "B", "C", "D", "answer", "image"])
    _text(folder / "mmbench/mmbench_dev_20230712/mmbench_dev_20230712.tsv", [head, *rows])
    videos = []
    for number, line in enumerate(lines[: len(lines) // 4]):
        turn = Turn("color", line["question"], "")
        prompt = _seed_prompt([line["image"]] * 4, turn, line["choices"])
        videos.append({"question_id": f"v{number}", "prompt": prompt, "answer": "ABCD"[line["answer"]]})
    _lines(folder / "seed_bench/video_input_4.jsonl", videos)


def _seed_prompt(images: Sequence[str], turn: Turn, options: Sequence[str]) -> str:
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True))
    tags = "".join(f"<img>{image}</img>\n" for image in images)
    return f"{tags}Question: {turn.question}\nOptions: {listed}\nAnswer:"


def _boxes(folder: Path, scenes: Sequence[Scene], side: int) -> None:
    """The object that each scene's box question names."""
    records = []
    for scene in scenes:
        thing = next(t for t in scene.things if next(scene.of("box")).answer.startswith(f"<ref>{t.name()}</ref>"))
        box = [round(share * side, 2) for share in thing.box]
        records.append({"image": scene.image, "sent": thing.name(), "bbox": box, "width": side, "height": side})
    for name, splits in {
        "refcoco": ("val", "testA", "testB"),
        "refcoco+": ("val",),
        "refcocog": ("val", "test"),
    }.items():
        for split in splits:
            _lines(folder / f"{name}/{name}_{split}.jsonl", records)


def _mme(folder: Path, scenes: Sequence[Scene]) -> None:
    """Two questions about each picture, one to be answered Yes and one No, in turn for each subtask."""
    texts: dict[str, list[str]] = {subtask: [] for subtask in SUBTASKS}
    for number, scene in enumerate(scenes):
        subtask = SUBTASKS[number % len(SUBTASKS)]
        images = folder / "mme" / "images" / subtask
        images.mkdir(parents=True, exist_ok=True)
        (images / f"{number}.png").write_bytes(_place(folder, scene.image).read_bytes())
        names = {thing.name() for thing in scene.things}
        absent = next(f"{color} {shape}" for color in COLORS for shape in SHAPES if f"{color} {shape}" not in names)
        for name, answer in ((scene.things[0].name(), "Yes"), (absent, "No")):
            texts[subtask].append("\t".join([f"{number}.png", EXISTS[False][0].format(name), answer]))
    for subtask, lines in texts.items():
        _text(folder / "mme" / "Your_Results" / f"{subtask}.txt", lines)


def _touchstone(folder: Path, scenes: Sequence[Scene]) -> None:
    """An open question about each of the first scenes."""
    rows = ["\t".join(["index", "image", "question", "human_annotation", "gpt4_ha_answer", "category", "task_name"])]
    for number, scene in enumerate(scenes[:20]):
        sentence = next(scene.of("describe")).answer
        image = base64.b64encode(_place(folder, scene.image).read_bytes()).decode()
        rows.append("\t".join([str(number), image, DESCRIBE[False][0], sentence, sentence, "description", "describe"]))
    _text(folder / "touchstone/touchstone_20230831.tsv", rows)


def _place(folder: Path, image: str) -> Path:
    """Where an image is written."""
    return folder / image.removeprefix("data/")


def _json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _lines(path: Path, records: Sequence[Any]) -> None:
    _text(path, [json.dumps(record, ensure_ascii=False) for record in records])


def _text(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder to write, which becomes --data")
    parser.add_argument("--scenes", type=int, default=500, help="default: %(default)s")
    args = parser.parse_args()
    check_fonts()
    write_datasets(args.folder, args.scenes)


if __name__ == "__main__":
    main()
