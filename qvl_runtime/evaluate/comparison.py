"""Two runs on the same questions: paired differences of their scores, with 95 % intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qvl_runtime.errors import DataError
from qvl_runtime.evaluate.bootstrap import Interval, difference_intervals
from qvl_runtime.evaluate.report import TaskReport
from qvl_runtime.evaluate.runner import RECORDS
from qvl_runtime.evaluate.scoring import Context, Mark

# Settings by which runs may differ and still be compared: what answers, and how exactly it computes.
OF_THE_MODEL = ("checkpoint", "dtype", "precision", "kv_dtype", "device", "url", "model")


class Difference(NamedTuple):
    """How much higher a score is than in the run compared with."""

    task: str
    score: str
    there: float  # in the run compared with
    here: float
    interval: Interval  # of here minus there
    same: int  # answers that are equal, character for character
    of: int  # answers that both have

    @property
    def certain(self) -> bool:
        """Whether zero is outside the interval."""
        return self.interval.low > 0 or self.interval.high < 0


def compare(report: TaskReport, folder: Path, context: Context | None = None) -> list[Difference]:
    """Compare a task with the run whose output folder this is, on the questions that both have answered.

    Raises `DataError` if that run has not this task, or asked other questions or in another way.
    """
    run, metric = report.run, report.run.task.metric
    if metric is None or not report.scores:
        return []
    path = folder / run.task.name / RECORDS
    _, entries = check_comparable(path, run.settings)
    others = [
        answer._replace(text=entries[answer.number].get("text", ""), error=entries[answer.number].get("error"))
        for answer in run.answers
        if answer.number in entries
    ]
    if not others:
        raise DataError(f"{path} has answered none of the questions of this run: run it first")
    mine = [run.answers[other.number] for other in others]
    context = context or Context()
    one, other = metric.marks(mine, context), metric.marks(others, context)
    found = difference_intervals(metric, one, other)
    values = _values(metric.scores([*{mark.name: 0 for mark in one}]), one)
    same = sum(a.text == b.text for a, b in zip(mine, others, strict=True))
    return [
        Difference(run.task.name, name, values[name] - interval.value, values[name], interval, same, len(mine))
        for name, interval in found.items()
    ]


def check_comparable(path: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """The settings and answers of another run, if a run with these settings can be compared with it.

    Raises `DataError` where it has asked other questions or in another way, and for a file that is missing.
    """
    there, entries = _read(path)
    for name in sorted({*there, *settings} - {*OF_THE_MODEL}):
        if there.get(name) != json.loads(json.dumps(settings.get(name))):
            raise DataError(
                f"{path} has {name} {there.get(name)!r} and this run has another: run both alike to compare"
            )
    return there, entries


def _values(scores: Mapping[str, Mapping[str, float]], marks: Sequence[Mark]) -> dict[str, float]:
    rates: dict[str, list[float]] = {}
    for mark in marks:
        rates.setdefault(mark.name, []).append(mark.value)
    means = {name: sum(values) / len(values) for name, values in rates.items()}
    return {score: sum(weight * means[name] for name, weight in weights.items()) for score, weights in scores.items()}


def _read(path: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        settings, *entries = (json.loads(line) for line in lines)
        return settings["settings"], {entry["number"]: entry for entry in entries}
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: run the task with that output folder first") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}): run it again to mend its end") from None


def table(differences: Sequence[Difference]) -> list[list[str]]:
    """Rows of task, score, there, here, difference, interval, equal answers."""
    return [
        [
            d.task,
            d.score,
            f"{d.there:.2f}",
            f"{d.here:.2f}",
            f"{d.interval.value:+.2f}",
            f"{d.interval.low:+.2f} to {d.interval.high:+.2f}"
            + ("" if d.certain or d.same == d.of else " (not certain)"),
            f"{d.same} of {d.of}",
        ]
        for d in differences
    ]


HEADINGS = ["task", "score", "there", "here", "difference", "95 % interval", "equal answers"]
