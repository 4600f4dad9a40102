"""Let lmms-eval ask `qvl serve` about images on the shipped nano, and compare each answer with the engine's.

python -m tools.lmms_eval_server .venv-lmms-eval/bin/python
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from qvl_runtime import Engine, SamplingParams
from tools.serving import serving

QUESTIONS = ("What can you see?", "Box the circle.", "图里有什么?")


def items(folder: Path) -> list[dict[str, str]]:
    """Some images and questions about each."""
    found = []
    for number, color in enumerate(("red", "blue", "orange")):
        path = folder / f"{number}.png"
        picture = Image.new("RGB", (200, 150), (200, 210, 220))
        ImageDraw.Draw(picture).ellipse((20 + 30 * number, 30, 90 + 30 * number, 100), fill=color)
        picture.save(path)
        found += [{"image": str(path), "question": question} for question in QUESTIONS]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, found)))
    return found


def main() -> int:
    """Run it; the exit code is 1 if an answer differs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked, out = items(folder), folder / "out.json"
        with serving("--dtype", "float32") as url:
            script = Path(__file__).with_name("lmms_eval_client.py")
            subprocess.run([sys.argv[1], str(script), f"{url}/v1", str(folder), str(out)], check=True)
        answers = json.loads(out.read_text())
        engine, wrong = Engine(dtype="float32"), 0
        params = SamplingParams(temperature=0, max_tokens=24)
        for number, item in enumerate(asked):
            parts: list[Any] = [{"type": "image", "image": item["image"]}, {"type": "text", "text": item["question"]}]
            expected = engine.chat([{"role": "user", "content": parts}], params).text
            got = answers.get(str(number))
            wrong += got not in (expected, [expected])
            if got not in (expected, [expected]):
                print(f"{item['question']!r}: lmms-eval got {got!r}, the engine says {expected!r}")
    print(f"{len(answers)} answers, {wrong} of them other than the engine's")
    return int(wrong > 0 or len(answers) != len(asked))


if __name__ == "__main__":
    sys.exit(main())
