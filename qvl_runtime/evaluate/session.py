"""A whole evaluation: several tasks in one output folder, with a report of them all."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvl_runtime.evaluate.asking import Asker
from qvl_runtime.evaluate.comparison import Difference, check_comparable, compare
from qvl_runtime.evaluate.judge import Judge, judge_answers
from qvl_runtime.evaluate.loading import load
from qvl_runtime.evaluate.plots import check_plots, plot
from qvl_runtime.evaluate.report import TaskReport, markdown, report_task, write_scored
from qvl_runtime.evaluate.runner import RECORDS, RunOptions, run_task
from qvl_runtime.evaluate.scoring import Context
from qvl_runtime.evaluate.submission import write_submission
from qvl_runtime.evaluate.tasks.task import Task

Progress = Callable[[str, int, int], None]  # task, answered, all


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What came out of an evaluation."""

    reports: list[TaskReport]
    differences: list[Difference]
    header: dict[str, Any]


def check_data(tasks: Sequence[Task], options: RunOptions) -> None:
    """Read the questions of all tasks before anything is run. Raises `DataError` for the first that is incomplete."""
    for task in tasks:
        load(task, options.data, options.limit, options.style.shots, options.seed, options.allow_missing)


def evaluate(
    tasks: Sequence[Task],
    asker: Asker,
    options: RunOptions,
    out: Path,
    header: Mapping[str, Any],
    *,
    scale: int = 999,
    against: Path | None = None,
    plots: bool = False,
    judge: Judge | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Run and score the tasks into OUT/TASK, and write OUT/report.json and OUT/report.md.

    scale: what boxes are divided by. against: the output folder of another run to compare with. judge: of the
    tasks that another model marks. A run that was stopped continues where it was.
    """
    context = Context(scale)
    if plots:
        check_plots()
    reports, differences = [], []
    seconds, asked, tokens = 0.0, 0, 0
    for task in tasks:
        folder, began = out / task.name, time.perf_counter()
        shown = None if progress is None else lambda done, total, name=task.name: progress(name, done, total)
        before = None if against is None else _comparable(task, against)
        run = run_task(task, asker, options, folder, shown, before)
        seconds, asked, tokens = seconds + time.perf_counter() - began, asked + run.asked, tokens + run.tokens
        judged = None
        if task.metric is None and judge is not None:
            judged = judge_answers(run.answers, judge, folder, shown)
        report = report_task(run, asker.chat_format, context, judged)
        reports.append(report)
        write_scored(report, folder / "scored.jsonl")
        if task.submission is not None:
            write_submission(task.submission, run.answers, context, folder)
        if against is not None:
            differences += compare(report, against, context)
    whole = {
        **header,
        "box scale": scale,
        "samples answered in this run": asked,
        "samples per second": round(asked / seconds, 2) if asked else None,
        "tokens generated in this run": tokens,
    }
    evaluation = Evaluation(reports, differences, whole)
    _write(evaluation, out, asker.chat_format)
    if plots:
        plot(reports, out)
    return evaluation


def _comparable(task: Task, against: Path) -> Callable[[Mapping[str, Any]], None]:
    """What makes sure, before a task is run, that it can be compared."""
    path = against / task.name / RECORDS

    def check(settings: Mapping[str, Any]) -> None:
        if task.metric is not None:
            check_comparable(path, settings)

    return check


def _write(evaluation: Evaluation, out: Path, chat_format: str) -> None:
    content = {
        "run": evaluation.header,
        "tasks": [report.record() for report in evaluation.reports],
        "differences": [difference_record(difference) for difference in evaluation.differences],
    }
    (out / "report.json").write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    page = markdown(evaluation.reports, evaluation.header, chat_format)
    (out / "report.md").write_text(page, encoding="utf-8")


def difference_record(difference: Difference) -> dict[str, Any]:
    """A difference as JSON."""
    return difference._asdict() | {"interval": difference.interval._asdict(), "certain": difference.certain}
