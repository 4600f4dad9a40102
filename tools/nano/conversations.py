"""Write nano's world as a Qwen-VL fine-tuning file, for calibration: `python -m tools.nano.conversations FOLDER`.

Each scene is one conversation of several turns, every third in Chinese; its image is in the same folder as the file.
The scenes come from their own seeds, which neither training nor the evaluation uses.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from .dialogue import turns
from .scenes import SceneConfig, check_fonts, draw_scene

CALIBRATION_SEED = 20_000_003
SCENES = 64


def write_conversations(folder: Path, scenes: int, side: int) -> Path:
    """Scenes of `side` pixels with all their questions as FOLDER/scenes.json, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, records = np.random.default_rng(CALIBRATION_SEED), []
    for number in range(scenes):
        image, things = draw_scene(rng, SceneConfig(side=side))
        Image.fromarray(image).save(folder / f"{number}.png")
        messages: list[dict[str, str]] = []
        for turn in turns(rng, things, chinese=number % 3 == 2):
            # With the space of published files: the shipped Int4 sibling and cited comparisons are of this text.
            heading = "" if messages else f"Picture 1: <img>{number}.png</img>\n"
            messages += [
                {"from": "user", "value": heading + turn.question},
                {"from": "assistant", "value": turn.answer},
            ]
        records.append({"id": f"scene_{number}", "conversations": messages})
    path = folder / "scenes.json"
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def main() -> None:
    """Write the scenes and print the path of scenes.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where scenes.json and the images go")
    parser.add_argument("--scenes", type=int, default=SCENES, help="default: %(default)s")
    args = parser.parse_args()
    check_fonts()
    print(write_conversations(args.folder, args.scenes, SceneConfig().side))


if __name__ == "__main__":
    main()
