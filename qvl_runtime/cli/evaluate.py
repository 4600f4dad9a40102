"""`qvl evaluate`: the published benchmarks, with the original's prompts and metrics."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvl_runtime.cli.options import DEFAULT_MODEL, OUTPUT, AsJson, Debug, EngineOptions, Quiet, model_folder
from qvl_runtime.cli.terminal import FAILED_RECORDS, print_json, print_table, progress_bar, say
from qvl_runtime.errors import ConfigError

if TYPE_CHECKING:
    from qvl_runtime.evaluate.asking import Asker
    from qvl_runtime.evaluate.judge import Judge
    from qvl_runtime.evaluate.session import Evaluation

ASKING, JUDGING = "Asking", "Judging"


@dataclass(frozen=True)
class EvaluatedModel(EngineOptions):
    """Which checkpoint is evaluated, given as the first argument."""

    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help=f"A checkpoint folder or a hub id; nano: {DEFAULT_MODEL}."),
    ] = None

    def named(self) -> str | None:
        """The model for `Engine`; None for the one that ships with qvl."""
        return None if self.model in (None, "nano") else self.model


def evaluate(
    *,
    models: EvaluatedModel,
    tasks: Annotated[
        list[str] | None, typer.Argument(metavar="TASK...", help="Tasks or groups of tasks; --list shows them.")
    ] = None,
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder of the data sets, the original's `data`.")
    ] = Path("data"),
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where answers and report go. Default: evaluation/MODEL.", rich_help_panel=OUTPUT
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Output of another run: show paired differences.", rich_help_panel=OUTPUT),
    ] = None,
    plots: Annotated[
        bool, typer.Option("--plots", help="Draw the scores; needs matplotlib.", rich_help_panel=OUTPUT)
    ] = False,
    style: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="original: its prompts as they are; chat: chat turns.", rich_help_panel=ASKING
        ),
    ] = "original",
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Instead of the task's prompt, with {images} (original), {question}, {hint}, {options}.",
            rich_help_panel=ASKING,
        ),
    ] = None,
    shots: Annotated[int, typer.Option(metavar="K", help="Examples before each question.", rich_help_panel=ASKING)] = 0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the examples.", rich_help_panel=ASKING)] = 0,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Only the first N questions of a task.", rich_help_panel=ASKING)
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Longest answer. Default: the task's.", rich_help_panel=ASKING)
    ] = None,
    scale: Annotated[
        int, typer.Option(metavar="N", help="What coordinates are divided by: 999 or 1000.", rich_help_panel=ASKING)
    ] = 999,
    allow_missing: Annotated[
        bool,
        typer.Option(
            "--allow-missing", help="Count questions whose image is missing as errors.", rich_help_panel=ASKING
        ),
    ] = False,
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Ask a server's MODEL instead of loading one: http://127.0.0.1:8000/v1.",
            rich_help_panel=ASKING,
        ),
    ] = None,
    judge_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="A server whose model marks TouchStone's answers.", rich_help_panel=JUDGING),
    ] = None,
    judge_model: Annotated[str, typer.Option(metavar="NAME", help="That model.", rich_help_panel=JUDGING)] = "gpt-4",
    show_list: Annotated[bool, typer.Option("--list", help="Show tasks and the files they need; run nothing.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Evaluate a checkpoint on the published benchmarks: scores with intervals next to the published ones.

    The data sets are not included: --list says which files each needs and where its authors publish them. An
    interrupted run continues when it is repeated. Some samples without an answer: exit code 3.

    [cyan]qvl evaluate Qwen/Qwen-VL textvqa_val refcoco_all --data ./data[/cyan]

    [cyan]qvl evaluate ./chat-int4 docvqa_val --limit 200 --against evaluation/Qwen-VL-Chat[/cyan]
    """
    if show_list:
        return _show_tasks()
    from qvl_runtime.evaluate.prompts import Style
    from qvl_runtime.evaluate.runner import RunOptions
    from qvl_runtime.evaluate.session import check_data
    from qvl_runtime.evaluate.session import evaluate as run
    from qvl_runtime.evaluate.tasks.table import chosen

    if scale not in (999, 1000):
        raise ConfigError(f"scale is {scale}; supported are 999, the evaluation's, and 1000, that of drawn boxes")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; expected at least 1")
    if not tasks:
        raise ConfigError("no task is given; expected MODEL and then tasks: `qvl evaluate --list` shows them")
    selected = chosen(tasks)
    options = RunOptions(data, Style(style, prompt, shots), limit, seed, max_tokens, allow_missing)
    check_data(selected, options)
    asker, header = _engine(models, quiet) if url is None else _server(url, models)
    folder = out or Path("evaluation") / Path(models.model or "nano").name
    with _bars(quiet) as progress:
        evaluation = run(
            selected,
            asker,
            options,
            folder,
            header,
            scale=scale,
            against=against,
            plots=plots,
            judge=_judge(judge_url, judge_model),
            progress=progress,
        )
    _show(evaluation, asker.chat_format, as_json, quiet, folder)
    return FAILED_RECORDS if any(report.errors for report in evaluation.reports) else 0


def _engine(models: EvaluatedModel, quiet: bool) -> tuple[Asker, dict[str, Any]]:
    """The engine that answers, and what the report says of it."""
    from dataclasses import replace

    from qvl_runtime.engine.engine import NANO
    from qvl_runtime.evaluate.asking import EngineAsker
    from qvl_runtime.evaluate.checkpoint import checkpoint_hash
    from qvl_runtime.profile.jsonable import jsonable
    from qvl_runtime.profile.run_info import RunInfo

    name = models.named() or NANO
    folder = model_folder(name, models.download, models.source)
    with progress_bar("hashing", None, shown=not quiet, in_bytes=True) as advance:
        found = checkpoint_hash(folder, lambda done, _: advance(done))
    engine = replace(models, model=str(folder)).open()
    report = engine.report()
    header = {
        "model": str(models.model or "nano"),
        "checkpoint": found.whole,
        "dtype": report["dtype"],
        "precision": models.precision,
        "kv_dtype": models.kv_dtype,
        "kernels": report["kernels"]["ops"],
        **jsonable(RunInfo.collect(engine.core.runner.model.device)),
    }
    return EngineAsker(engine, found.whole), header


def _judge(url: str | None, model: str) -> Judge | None:
    from qvl_runtime.evaluate.http_client import Client
    from qvl_runtime.evaluate.judge import Judge

    return None if url is None else Judge(Client(url, os.environ.get("OPENAI_API_KEY")), model)


def _server(url: str, models: EvaluatedModel) -> tuple[Asker, dict[str, Any]]:
    """The server that answers. An API key is taken from the environment, as OpenAI's clients do."""
    from qvl_runtime.evaluate.http_client import Client
    from qvl_runtime.evaluate.remote import ServerAsker

    asker = ServerAsker(Client(url, os.environ.get("OPENAI_API_KEY")), models.model)
    return asker, {"model": asker.model, "url": url, "date": time.strftime("%Y-%m-%d %H:%M")}


@contextmanager
def _bars(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each task, one after another; yields what to call with task, answered and all questions."""
    with ExitStack() as open_bar:
        shown: dict[str, Callable[[int], None]] = {}

        def show(task: str, done: int, total: int) -> None:
            if task not in shown:
                open_bar.close()
                shown[task] = open_bar.enter_context(progress_bar(task, total, done, shown=not quiet))
            shown[task](done)

        yield show


def _show(evaluation: Evaluation, chat_format: str, as_json: bool, quiet: bool, folder: Path) -> None:
    from rich.table import Table

    from qvl_runtime.evaluate import comparison, report
    from qvl_runtime.evaluate.session import difference_record

    if as_json:
        content = {
            "run": evaluation.header,
            "tasks": [one.record() for one in evaluation.reports],
            "differences": [difference_record(one) for one in evaluation.differences],
        }
        print_json(content)
        return
    tables = [(report.headings(chat_format), report.rows(evaluation.reports))]
    if evaluation.differences:
        tables.append((comparison.HEADINGS, comparison.table(evaluation.differences)))
    for headings, rows in tables:
        table = Table(*headings)
        for row in rows:
            table.add_row(*row)
        print_table(table)
    for one in evaluation.reports:
        for note in one.notes:
            say(f"{one.run.task.name}: {note}")
    if not quiet:
        asked, speed = evaluation.header["samples answered in this run"], evaluation.header["samples per second"]
        speed = "" if speed is None else f", {speed} a second"
        say(f"{asked} samples answered{speed}; report, answers and submissions are in {folder}")


def _show_tasks() -> int:
    from rich.table import Table

    from qvl_runtime.evaluate.loading import expected
    from qvl_runtime.evaluate.tasks.table import GROUPS, TASKS

    table = Table("task", "data set", "files in the data folder", "where they are from")
    for task in TASKS.values():
        table.add_row(task.name, task.title, "\nor ".join(expected(task)), task.source)
    print_table(table)
    for name, members in GROUPS.items():
        print(f"{name}: {' '.join(members)}")
    return 0
