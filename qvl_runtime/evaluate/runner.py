"""Run a task: ask what has no answer yet, and keep every answer at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qvl_runtime.errors import QVLError
from qvl_runtime.evaluate.asking import Asker, Reply
from qvl_runtime.evaluate.loading import Loaded, load
from qvl_runtime.evaluate.prompts import VERSION, Question, Style
from qvl_runtime.evaluate.records import Records
from qvl_runtime.evaluate.scoring import Answer
from qvl_runtime.evaluate.tasks.task import Task

RECORDS = "samples.jsonl"


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How the tasks of a run are asked."""

    data: Path
    style: Style = field(default_factory=Style)
    limit: int | None = None  # questions of each task, the first ones
    seed: int = 0  # of the examples
    max_tokens: int | None = None  # instead of the task's
    allow_missing: bool = False  # count the questions of images that are not there as errors


@dataclass(frozen=True, slots=True)
class TaskRun:
    """The answers of a task."""

    task: Task
    answers: list[Answer]
    total: int  # questions of the data set, before a limit
    settings: Mapping[str, Any]
    asked: int  # in this run; the others were answered in earlier ones
    tokens: int  # generated in this run
    prompts: list[str]  # SHA-256 of each sample's prompt

    @property
    def settings_hash(self) -> str:
        """SHA-256 of the settings, by which runs are told apart."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()


def run_task(
    task: Task,
    asker: Asker,
    options: RunOptions,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
    before: Callable[[Mapping[str, Any]], None] | None = None,
) -> TaskRun:
    """Answer the questions of a task into FOLDER/samples.jsonl, where answers of earlier runs are kept.

    progress: called with the number of questions answered and of all. before: called with the settings before anything
    is asked. Raises `DataError` for an incomplete data folder and where the file belongs to a run with other settings.
    A sample that fails is kept with its error.
    """
    loaded = load(task, options.data, options.limit, options.style.shots, options.seed, options.allow_missing)
    questions = [*_questions(task, loaded, options)]
    settings = _settings(task, asker, options, loaded)
    if before is not None:
        before(settings)
    with Records(folder / RECORDS, settings) as records:
        open_ = [(i, q) for i, q in enumerate(questions) if i not in records.entries]
        tokens, answered = 0, len(questions) - len(open_)
        if progress is not None:
            progress(answered, len(questions))
        for number, reply in asker.answers(open_):
            tokens += 0 if isinstance(reply, QVLError) else reply.tokens
            records.add(_entry(number, loaded, questions[number], reply))
            answered += 1
            if progress is not None:
                progress(answered, len(questions))
        entries = records.entries
    answers = [
        Answer(number, sample, entries[number].get("text", ""), entries[number].get("error"))
        for number, sample in enumerate(loaded.samples)
    ]
    digests = [question.digest for question in questions]
    return TaskRun(task, answers, loaded.total, settings, len(open_), tokens, digests)


def _questions(task: Task, loaded: Loaded, options: RunOptions) -> Iterator[Question]:
    limits = (task.limits[0], options.max_tokens or task.limits[1])
    for number, sample in enumerate(loaded.samples):
        examples = loaded.examples[number] if loaded.examples else ()
        yield options.style.ask(sample, task.form, (min(limits), limits[1]), examples)


def _settings(task: Task, asker: Asker, options: RunOptions, loaded: Loaded) -> dict[str, Any]:
    """All that an answer depends on; not the limit, by which a run may grow, nor what only scoring uses."""
    return {
        "task": task.name,
        "files": loaded.files,
        "style": options.style.name,
        "prompt": options.style.text(task.form),
        "prompt_version": VERSION,
        "shots": options.style.shots,
        "seed": options.seed if options.style.shots else None,
        "tokens": [task.limits[0], options.max_tokens or task.limits[1]],
        **asker.identity(),
    }


def _entry(number: int, loaded: Loaded, question: Question, reply: Reply | QVLError) -> dict[str, Any]:
    entry: dict[str, Any] = {"number": number, "id": loaded.samples[number].id, "prompt": question.digest}
    if isinstance(reply, QVLError):
        return {**entry, "error": str(reply)}
    more = {"likelihoods": list(reply.likelihoods)} if reply.likelihoods else {}
    return {**entry, "text": reply.text, "tokens": reply.tokens, **more}
