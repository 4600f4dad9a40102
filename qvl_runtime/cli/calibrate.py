"""`qvl calibrate`: fit the confidence of a checkpoint's boxes on images with known boxes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from qvl_runtime.cli.endpoints import Input
from qvl_runtime.cli.locate import Question
from qvl_runtime.cli.options import OUTPUT, AsJson, Debug, EngineOptions, Quiet
from qvl_runtime.cli.streams import argument_text
from qvl_runtime.cli.terminal import print_json, progress_bar, say
from qvl_runtime.engine.records import parse_record
from qvl_runtime.errors import PromptError, quoted


def calibrate(
    *,
    data: Annotated[Path, typer.Argument(metavar="DATA.jsonl", help="Images, phrases and boxes; - is standard input.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File to write. Default: box_calibration.json in the checkpoint's folder.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    iou: Annotated[float, typer.Option(metavar="X", help="Overlap from which a box is right.")] = 0.5,
    question: Question = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw how well the confidence holds, as a PNG.", rich_help_panel=OUTPUT),
    ] = None,
    models: EngineOptions,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Fit the confidence of a checkpoint's boxes, so that of those with a confidence of 0.8, 80 of 100 are right.

    Each line of DATA.jsonl is an image, a phrase, and the box of what it names on the 0-1000 grid, or null if the image
    has no such thing. Half of them are fitted on; the report is for the other half.

    [cyan]{"image": "dog.jpg", "phrase": "the dog", "box": [120, 80, 640, 900]}[/cyan]

    [cyan]{"image": "dog.jpg", "phrase": "the cat", "box": null}[/cyan]
    """
    from qvl_runtime.engine.calibrating import Judged, fit, plot_reliability
    from qvl_runtime.engine.locating import overlap
    from qvl_runtime.prompt.box_calibration import FILE
    from qvl_runtime.prompt.boxes import Box

    if not 0 < iou <= 1:
        raise PromptError(f"--iou is {iou:g}; expected a number above 0, up to 1")
    question = None if question is None else argument_text(question, "--question")
    records = list(_records(data))
    engine = models.open()
    target = engine.folder / FILE if out is None else out
    engine.core.answers.judge = replace(engine.core.answers.judge, calibration=None)
    judged = []
    with progress_bar("locating", len(records), shown=not quiet) as advance:
        for number, (image, phrase, corners) in enumerate(records, start=1):
            located = engine.locate(image, phrase, question=question)
            right = 0.0 if corners is None else overlap(located.boxes[0], Box(phrase, *corners))
            judged.append(Judged(located.boxes[0], right))
            advance(number)
    found = fit(judged, iou, question)
    target.write_text(json.dumps(found.to_dict(), indent=1) + "\n", "utf-8")
    if plot is not None:
        held_out = [(found.confidence(one.box.details), one.iou >= iou) for one in judged[1::2] if one.box.details]
        title = f"{engine.folder.name}: {len(held_out)} boxes held out, ECE {found.ece:.3f}"
        plot_reliability([c for c, _ in held_out], [r for _, r in held_out], str(plot), title)
    if as_json:
        print_json(found.to_dict() | {"written": str(target)})
    elif not quiet:
        say(
            f"fitted on {found.boxes} boxes; of {found.held_out} others: ECE {found.ece:.3f}, AUROC {found.auroc:.3f}; "
            f"written to {target}"
        )
    return 0


def _records(data: Path) -> Iterator[tuple[str, str, tuple[int, int, int, int] | None]]:
    """The lines as image, phrase and box. Raises `PromptError`, naming the line, for anything else."""
    source = Input(data)
    try:
        for line in source.lines():
            if line is None:
                continue
            record = parse_record(line, source.name)
            where = f"{source.name} line {line.number}"
            image, phrase, box = (record.get(key) for key in ("image", "phrase", "box"))
            if set(record) != {"image", "phrase", "box"} or not isinstance(image, str) or not isinstance(phrase, str):
                raise PromptError(f'{where} has {quoted(sorted(record))}; expected "image", "phrase" and "box"')
            if not Path(image).is_absolute() and "://" not in image and not image.startswith("data:"):
                image = str(data.parent / image) if source.path is not None else image
            yield image, phrase, None if box is None else _corners(box, where)
    finally:
        source.close()


def _corners(box: Any, where: str) -> tuple[int, int, int, int]:
    if not isinstance(box, list) or len(box) != 4 or not all(type(number) is int for number in box):
        raise PromptError(f"{where} has the box {quoted(box)}; expected [x1, y1, x2, y2] in whole numbers, or null")
    x1, y1, x2, y2 = box
    return x1, y1, x2, y2
