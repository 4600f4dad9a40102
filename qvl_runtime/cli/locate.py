"""`qvl locate`: find what a phrase names in an image, with scores."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvl_runtime.cli.drawing import check_drawable, save_image
from qvl_runtime.cli.options import OUTPUT, AsJson, Debug, EngineOptions, Font, Quiet
from qvl_runtime.cli.streams import argument_text, check_output
from qvl_runtime.cli.terminal import print_json, say

if TYPE_CHECKING:
    from qvl_runtime.engine.locating import Located
    from qvl_runtime.prompt.boxes import Box

Question = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT", help="Ask this, with {} for the phrase, as 'Box the {}.' Default: the checkpoint's, or nothing."
    ),
]


def locate(
    *,
    image: Annotated[str, typer.Argument(help="A file, http(s) URL or data URL.")],
    phrase: Annotated[str, typer.Argument(help="What to look for: 'the red car'.")],
    k: Annotated[int, typer.Option("-k", metavar="N", help="Boxes to find, the likeliest first.")] = 1,
    question: Question = None,
    models: EngineOptions,
    as_json: AsJson = False,
    draw: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the image with the boxes drawn.", rich_help_panel=OUTPUT)
    ] = None,
    font: Font = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Find what a phrase names in an image: a box and how sure the model is of it.

    [cyan]qvl locate dog.jpg "the dog" --draw boxed.png[/cyan]

    [cyan]qvl locate street.jpg "a person" -k 5 --json[/cyan]
    """
    check_output()
    phrase = argument_text(phrase, "the phrase")
    question = None if question is None else argument_text(question, "--question")
    if draw is not None:
        check_drawable(draw, font)
    located = models.open().locate(image, phrase, k, question)
    if draw is not None:
        save_image(located.draw(font), draw)
    if as_json:
        print_json(_record(located, draw))
        return 0
    for box, mass in zip(located.boxes, located.masses, strict=True):
        print(_line(box, mass, located))
    if not quiet and located.presence < 0.5:
        say(f"note: the model would write a box here with a probability of {located.presence:.2g} only")
    return 0


def _line(box: Box, mass: float, located: Located) -> str:
    sure = f"score {box.score or 0:.2f}"
    if box.details is not None and box.details.confidence is not None:
        sure = f"right with a probability of {box.details.confidence:.2f}, {sure}"
    if len(located.boxes) > 1:
        sure += f", share {mass:.2g}"
    return f"({box.x1}, {box.y1}) to ({box.x2}, {box.y2}) of 1000: {sure}"


def _record(located: Located, draw: Path | None) -> dict[str, Any]:
    image = located.image
    return {
        "phrase": located.phrase,
        "presence": located.presence,
        "boxes": [
            asdict(box) | {"pixels": box.pixels(image.width, image.height), "mass": mass}
            for box, mass in zip(located.boxes, located.masses, strict=True)
        ],
        "image": {"width": image.width, "height": image.height},
        "drawn": None if draw is None else str(draw),
    }
