"""A fake engine that answers by rule, at a given speed, and helpers to run `qvl` with it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from typer.testing import CliRunner, Result

from qvl_runtime.cli.app import app
from qvl_runtime.errors import ImageError
from qvl_runtime.prompt.boxes import parse_boxes
from qvl_runtime.prompt.images import LoadedImage, load_image
from qvl_runtime.schedule.api import Completion, SamplingParams, StreamPiece, Timings, Usage

SCRIPT = """
import sys
from qvl_runtime.cli.app import main
from qvl_runtime.cli.options import ModelOptions
from tests.fakes import FakeEngine
def open_fake(self):
    print("ready", file=sys.stderr, flush=True)
    return FakeEngine({arguments})
ModelOptions.open = open_fake
sys.argv = ["qvl", *sys.argv[1:]]
main()
"""

BOXED = "<ref>dog</ref><box>(100,200),(300,400)</box>"


class FakeEngine:
    """Echoes the prompt, word by word; answers `Box …` with one box. Records its calls."""

    def __init__(self, pause_s: float = 0.0, words: int | None = None) -> None:
        self.pause_s = pause_s
        self.words = words  # this many words whatever the prompt; None: an echo
        self.calls: list[tuple[Any, SamplingParams]] = []

    def chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams, *, stream: bool = False
    ) -> Iterator[StreamPiece]:
        assert stream, "the command line streams"
        self.calls.append((list(messages), params))
        content = messages[-1]["content"]
        images = [part["image"] for part in content if part["type"] == "image"]
        return self._answer(content[-1]["text"], images)

    def stream(self, prompt: Any, params: SamplingParams) -> Iterator[StreamPiece]:
        self.calls.append((prompt, params))
        return self._answer(str(prompt), [])

    def defaults_note(self, params: SamplingParams) -> str | None:
        return None if params.temperature == 0 else "from generation_config.json: top_p 0.5"

    def report(self) -> dict[str, Any]:
        return {
            "model": {"folder": "some/where/fake", "load_s": 0.25},
            "device": "nothing (a fake)",
            "dtype": "words",
            "kernels": {"ops": "none", "why": "it answers by rule"},
            "memory": {"weights": 3 * 2**20, "kv_reserved": 512},
        }

    def _answer(self, prompt: str, images: list[str]) -> Iterator[StreamPiece]:
        loaded = tuple(_read(image) for image in images)
        text = BOXED if prompt.startswith("Box") else f"you said {prompt}"
        pieces = [text] if self.words is None else [f"word{i} " for i in range(self.words)]
        for piece in pieces:
            time.sleep(self.pause_s)
            yield StreamPiece(piece, (1,))
        text = "".join(pieces)
        yield StreamPiece(
            "",
            (),
            Completion(
                text,
                tuple(range(len(pieces))),
                "stop",
                Usage(10, len(pieces), 4 * len(loaded), len(loaded)),
                Timings(0.01, 0.02, 0.05, 0.5, 10, len(pieces)),
                tuple(parse_boxes(text)),
                images=loaded,
            ),
        )


def _read(image: str) -> LoadedImage:
    if not Path(image).exists():
        raise ImageError(f"image {image}\ndoes not exist; give the path of a file")
    return load_image(image, 32)


def make_image(path: Path, size: tuple[int, int] = (60, 40)) -> Path:
    Image.new("RGB", size, "white").save(path)
    return path


def qvl(*arguments: object, stdin: str | None = None) -> Result:
    """Run `qvl` in this process."""
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], input=stdin, env={"NO_COLOR": "1", "COLUMNS": "100"}
    )


def start(arguments: str, *argv: str, **options: Any) -> subprocess.Popen[str]:
    """`qvl` as a process, with a fake engine made with these arguments."""
    script = SCRIPT.format(arguments=arguments)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", script, *argv], text=True, **(pipes | options))
