"""The report of a run: each score with its interval next to the published one, and all that it takes to repeat it."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qvl_runtime.evaluate.bootstrap import score_intervals
from qvl_runtime.evaluate.judge import JUDGED, Judged
from qvl_runtime.evaluate.published import published
from qvl_runtime.evaluate.runner import TaskRun
from qvl_runtime.evaluate.scoring import Answer, Context, Mark

MODELS = {"raw": "Qwen-VL", "chatml": "Qwen-VL-Chat"}


@dataclass(frozen=True, slots=True)
class Score:
    """A score of a task."""

    name: str
    count: int  # of the marks that it rests on
    value: float  # over all samples; an error counts as a wrong answer
    low: float  # of the 95 % interval
    high: float
    good: float | None  # over the samples without an error; None where there are no errors
    published: float | None

    @property
    def difference(self) -> float | None:
        """How much higher than published."""
        return None if self.published is None else self.value - self.published


@dataclass(frozen=True, slots=True)
class TaskReport:
    """What came out of a task."""

    run: TaskRun
    scores: list[Score]  # the headline first; empty where the split keeps its answers secret
    notes: list[str]
    marks: list[Mark]

    @property
    def errors(self) -> int:
        """Samples without an answer."""
        return sum(answer.error is not None for answer in self.run.answers)

    def record(self) -> dict[str, Any]:
        """The report as JSON."""
        run, task = self.run, self.run.task
        return {
            "task": task.name,
            "title": task.title,
            "metric": task.metric.name if task.metric else "judged",
            "samples": len(run.answers),
            "of": run.total,
            "errors": self.errors,
            "settings_hash": run.settings_hash,
            "settings": run.settings,
            "notes": self.notes,
            "scores": [asdict(score) | {"difference": score.difference} for score in self.scores],
        }


def report_task(
    run: TaskRun, chat_format: str, context: Context | None = None, judged: Judged | None = None
) -> TaskReport:
    """Score the answers of a task; `judged` are the marks of another model, where that is how it is scored."""
    context = context or Context()
    task, metric = run.task, run.task.metric or JUDGED
    if task.metric is None and (judged is None or not judged.marks):
        return TaskReport(run, [], [*_notes(run, chat_format), "not judged: name a judge, or submit the file"], [])
    if judged is None and not all(answer.sample.references for answer in run.answers):
        secret = "the answers of this split are secret: submit the file to its authors"
        return TaskReport(run, [], [*_notes(run, chat_format), secret], [])
    marks = metric.marks(run.answers, context) if judged is None else judged.marks
    good = [answer for answer in run.answers if answer.error is None]
    of_good = {}
    if judged is None and 0 < len(good) < len(run.answers):
        of_good = {name: found.value for name, found in score_intervals(metric, metric.marks(good, context)).items()}
    counts = Counter(mark.name for mark in marks)
    weights = metric.scores(counts)
    scores = [
        Score(
            name,
            sum(counts[part] for part in weights[name]),
            *found,
            of_good.get(name),
            published(task.name, name, headline=at == 0).of(chat_format),
        )
        for at, (name, found) in enumerate(score_intervals(metric, marks).items())
    ]
    notes = _notes(run, chat_format)
    if judged is not None and judged.failed:
        notes.append(f"{judged.failed} judgments gave no marks and are left out")
    return TaskReport(run, scores, notes, marks)


def _notes(run: TaskRun, chat_format: str) -> list[str]:
    task, count = run.task, len(run.answers)
    notes = []
    if task.form.is_chat and chat_format == "raw":
        notes.append("asked as chat turns, which a base model was not trained for; published for Chat alone")
    if count < run.total:
        part = f"the first {count} of {run.total} samples"
        whole = task.metric is not None and task.metric.whole_set
        notes.append(f"not comparable: {part}, and the metric depends on the whole set" if whole else f"only {part}")
    if errors := sum(answer.error is not None for answer in run.answers):
        notes.append(f"{errors} samples could not be answered and count as wrong")
    if task.name.startswith("refcoco"):
        notes.append("all samples count; the original's loader drops the last incomplete batch")
    return notes


def write_scored(report: TaskReport, path: Path) -> None:
    """One line a sample: id, hash of the prompt, raw text, the text that is compared, and its marks."""
    run, metric = report.run, report.run.task.metric
    marks: dict[int, dict[str, float]] = defaultdict(dict)
    for mark in report.marks:
        marks[mark.number][mark.name] = mark.value
    with path.open("w", encoding="utf-8") as file:
        for answer in run.answers:
            line: dict[str, Any] = {
                "number": answer.number,
                "id": answer.sample.id,
                "prompt": run.prompts[answer.number],
            }
            if answer.error is not None:
                line["error"] = answer.error
            else:
                line |= {"text": answer.text, "processed": metric.processed(answer.text) if metric else answer.text}
            line |= {"references": _shown(answer), "marks": marks[answer.number]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _shown(answer: Answer) -> list[Any]:
    return [
        reference["answer"] if isinstance(reference, Mapping) else reference for reference in answer.sample.references
    ]


def rows(reports: Sequence[TaskReport]) -> list[list[str]]:
    """The table of the scores: task, score, marks that it rests on, errors, value, interval, published, difference."""
    table = []
    for report in reports:
        for score in report.scores:
            good = "" if score.good is None else f" ({score.good:.2f} of those answered)"
            known = score.published is not None
            table.append(
                [
                    report.run.task.title,
                    score.name,
                    str(score.count),
                    str(report.errors or ""),
                    f"{score.value:.2f}{good}",
                    f"{score.low:.2f} to {score.high:.2f}",
                    f"{score.published:.2f}" if known else "",
                    f"{score.difference:+.2f}" if known else "",
                ]
            )
        if not report.scores:
            table.append(
                [report.run.task.title, "–", str(len(report.run.answers)), str(report.errors or ""), "", "", "", ""]
            )
    return table


def headings(chat_format: str) -> list[str]:
    """The names of the columns of `rows`."""
    return [
        "task",
        "score",
        "marks",
        "errors",
        "value",
        "95 % interval",
        f"published, {MODELS[chat_format]}",
        "difference",
    ]


def markdown(reports: Sequence[TaskReport], header: Mapping[str, Any], chat_format: str) -> str:
    """The report as a page: the table, notes, and what it takes to repeat the run."""
    lines = ["# Evaluation", "", f"| {' | '.join(headings(chat_format))} |", "|---" * 8 + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(reports)]
    notes = [f"- {report.run.task.title}: {note}" for report in reports for note in report.notes]
    if notes:
        lines += ["", "## Notes", "", *notes]
    lines += ["", "## Run", "", *(f"- {name}: {value}" for name, value in header.items())]
    lines += ["", "## Prompts", "", "| task | style | tokens | prompt | settings |", "|---" * 5 + "|"]
    for report in reports:
        settings = report.run.settings
        prompt = json.dumps(settings["prompt"], ensure_ascii=False).replace("|", "\\|")
        fewest, most = settings["tokens"]
        shots = f", {settings['shots']} shots" if settings["shots"] else ""
        style = f"{settings['style']}{shots}"
        lines.append(
            f"| {report.run.task.name} | {style} | {fewest} to {most} | `{prompt}` | {report.run.settings_hash[:12]} |"
        )
    return "\n".join(lines) + "\n"
