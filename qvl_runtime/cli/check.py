"""`qvl check`: does a checkpoint do here what its authors documented?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from qvl_runtime.cli.options import OUTPUT, AsJson, Debug, EngineOptions, Quiet, model_folder
from qvl_runtime.cli.terminal import FAILED_RECORDS, print_json, say


@dataclass(frozen=True)
class CheckedModel(EngineOptions):
    """Which checkpoint is checked, given as the first argument."""

    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A checkpoint folder or a hub id such as Qwen/Qwen-VL-Chat.")
    ] = None


def check(
    *,
    models: CheckedModel,
    picture: Annotated[
        str | None,
        typer.Option(
            "--picture", "-i", metavar="IMAGE", help="The authors' demo picture: a copy of it, or its address."
        ),
    ] = None,
    dialogues: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Dialogues of your own, as JSON, instead of the documented ones."),
    ] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Another checkpoint, such as the Int4 one, to compare with.")
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Measure speed next to the documented table.")
    ] = True,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the page here, too, to attach it to an issue.", rich_help_panel=OUTPUT
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Check a checkpoint: files, finite logits, the authors' dialogues, speed and memory, on one page.

    The documented dialogues are about the authors' demo picture, whose address is in docs/evaluation.md. The exit code
    is 3 where something is not as it should be.

    [cyan]qvl check Qwen/Qwen-VL-Chat --picture demo.jpeg --out check.md[/cyan]

    [cyan]qvl check Qwen/Qwen-VL-Chat --picture demo.jpeg --compare Qwen/Qwen-VL-Chat-Int4[/cyan]
    """
    from qvl_runtime.config.generation import GenerationDefaults
    from qvl_runtime.engine.engine import NANO
    from qvl_runtime.evaluate.check.check import check as run
    from qvl_runtime.evaluate.check.dialogues import documented, read_dialogues
    from qvl_runtime.evaluate.check.page import page
    from qvl_runtime.profile.jsonable import jsonable

    folder = model_folder(models.model or NANO, models.download, models.source)
    other = None if compare is None else model_folder(compare, models.download, models.source)
    if dialogues is not None:
        asked = read_dialogues(dialogues)
    else:
        asked = documented(GenerationDefaults.from_folder(folder).chat_format)
    report = run(
        lambda path: replace(models, model=str(path)).open(),
        folder,
        asked,
        picture,
        other,
        speed,
        (lambda task: None) if quiet else lambda task: say(f"{task} ..."),
    )
    text = page(report)
    if out is not None:
        out.write_text(text, encoding="utf-8")
    if as_json:
        print_json(jsonable(report) | {"reproduced": report.reproduced, "passed": report.passed})
    else:
        print(text, end="")
    return 0 if report.passed else FAILED_RECORDS
