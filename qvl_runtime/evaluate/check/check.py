"""Run a check: files, logits, dialogues, a comparison with another checkpoint, speed and memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvl_runtime.engine.engine import Engine
from qvl_runtime.errors import NumericsError
from qvl_runtime.evaluate.check.dialogues import Dialogue
from qvl_runtime.evaluate.check.files import FilesReport, check_files
from qvl_runtime.evaluate.check.replies import Compared, compare_dialogue
from qvl_runtime.host import peak_memory
from qvl_runtime.profile.run_info import RunInfo
from qvl_runtime.profile.speed import SpeedReport, profile_speed

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a check found."""

    model: str
    machine: RunInfo
    engine: dict[str, Any]  # `Engine.report`
    files: FilesReport
    finite: bool | None  # whether all logits of a prompt with the picture are finite; None: no picture
    compared: list[Compared]
    other: str | None  # the checkpoint compared with
    of_other: list[Compared]
    speed: SpeedReport | None
    peak_bytes: int

    @property
    def reproduced(self) -> list[str]:
        """The dialogues whose turns are all reproduced."""
        names = dict.fromkeys(one.dialogue for one in self.compared)
        return [name for name in names if all(one.reproduced for one in self.compared if one.dialogue == name)]

    @property
    def passed(self) -> bool:
        """Whether logits are finite and, if any was asked, a dialogue is reproduced."""
        return self.finite is not False and (bool(self.reproduced) or not self.compared)


def check(
    load: Callable[[Path], Engine],
    folder: Path,
    dialogues: Sequence[Dialogue],
    picture: Any = None,
    other: Path | None = None,
    speed: bool = True,
    progress: Progress = lambda task: None,
) -> CheckReport:
    """Check the checkpoint in a folder; `other` is one to compare its answers with, such as the Int4 one.

    load: makes an engine of a folder; the two are not in memory together. picture: of the dialogues that name none;
    without it these are not asked.
    """
    progress("hashing the files")
    files = check_files(folder)
    progress("loading")
    engine = load(folder)
    asked = [dialogue for dialogue in dialogues if dialogue.picture is not None or picture is not None]
    compared = _compare(engine, asked, picture, progress)
    finite = _finite(engine, asked[0].picture or picture) if asked else None
    measured = None
    if speed:
        progress("speed")
        measured = profile_speed(engine, batches=(1,), rounds=3)
    device = engine.core.runner.model.device
    report, machine, peak = engine.report(), RunInfo.collect(device), peak_memory(device)
    of_other: list[Compared] = []
    if other is not None:
        del engine
        progress(f"loading {other.name}")
        of_other = _compare(load(other), asked, picture, progress)
    name = None if other is None else str(other)
    return CheckReport(str(folder), machine, report, files, finite, compared, name, of_other, measured, peak)


def _compare(engine: Engine, dialogues: Sequence[Dialogue], picture: Any, progress: Progress) -> list[Compared]:
    compared = []
    for dialogue in dialogues:
        progress(f"dialogue {dialogue.name}")
        compared += compare_dialogue(engine, dialogue, picture)
    return compared


def _finite(engine: Engine, picture: Any) -> bool:
    """Whether the logits after every token of a prompt with the picture are finite."""
    try:
        scored = engine.score([{"image": picture}, {"text": "Describe it."}])
    except NumericsError:
        return False
    return all(math.isfinite(value) for value in scored.logprobs.tolist())
