"""`qvl profile speed` and `qvl profile memory`: reproduce the published tables on this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from qvl_runtime.cli.command import Group, add_command
from qvl_runtime.cli.options import AsJson, Debug, RunOptions
from qvl_runtime.cli.terminal import print_table, say
from qvl_runtime.errors import ConfigError

if TYPE_CHECKING:
    from qvl_runtime.profile.memory import MemoryReport
    from qvl_runtime.profile.speed import SpeedReport

HELP = """Measure speed and memory the way the model's authors did.

[cyan]qvl profile speed --synthetic qwen-vl-chat-int4 --precision fast[/cyan]

[cyan]qvl profile memory --model Qwen/Qwen-VL-Chat-Int4[/cyan]
"""

profile_app = typer.Typer(cls=Group, no_args_is_help=True, rich_markup_mode="rich", help=HELP)
Batches = Annotated[str, typer.Option(metavar="N,N,…", help="Batch sizes to measure decoding at.")]
Tokens = Annotated[
    int | None,
    typer.Option(metavar="N", help="Generate N tokens; longer answers are estimated from steps sampled along them."),
]


def speed(
    *,
    tokens: Tokens = None,
    batch: Batches = "1,2,4,8",
    models: RunOptions,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Mean tokens per second over 1792 and 7934 generated tokens after one image, and where the time goes.

    [cyan]qvl profile speed --synthetic qwen-vl-chat-int4 --precision fast[/cyan]

    [cyan]qvl profile speed --model Qwen/Qwen-VL-Chat-Int4 --tokens 1792[/cyan]
    """
    sizes = _parse_numbers(batch)
    from qvl_runtime.profile.jsonable import jsonable
    from qvl_runtime.profile.run_info import RunInfo
    from qvl_runtime.profile.speed import profile_speed

    engine = models.open()
    report = profile_speed(engine, tokens, batches=sizes, progress=_progress)
    run_info = RunInfo.collect(engine.core.runner.model.device)
    if as_json:
        print(json.dumps({"machine": jsonable(run_info), "speed": jsonable(report)}, indent=2))
    else:
        say(f"{engine.summary()}; {run_info.date}")
        show_speed(report)
    return 0


def memory(*, models: RunOptions, as_json: AsJson = False, debug: Debug = False) -> int:
    """Peak memory of encoding 2048 tokens and of generating 8192, compared with the published figures.

    [cyan]qvl profile memory --synthetic qwen-vl-chat-int4 --precision fast[/cyan]
    """
    from qvl_runtime.profile.jsonable import jsonable
    from qvl_runtime.profile.memory import profile_memory
    from qvl_runtime.profile.process import process_bytes

    base = process_bytes(models.folder(), models.dtype, models.synthetic)
    report = profile_memory(models.open, base, _progress)
    if as_json:
        print(json.dumps({"memory": jsonable(report)}, indent=2))
    else:
        show_memory(report)
    return 0


def show_speed(report: SpeedReport) -> None:
    """Print a speed report as tables and lines."""
    from qvl_runtime.profile.speed import as_table

    ceilings, answer = report.ceilings, report.answer
    show_table(f"mean speed, {report.weights}", as_table(report))
    total = sum(answer.split.values())
    print(
        f"one image, {answer.tokens} tokens: first token after {answer.ttft_s:.2f} s, then one every "
        + ", ".join(f"{1e3 * s:.1f} ms ({name})" for name, s in answer.tpot_s.items())
    )
    print("  " + ", ".join(f"{name} {s:.2f} s ({s / total:.0%})" for name, s in answer.split.items()))
    for batch in report.batches:
        print(f"  batch of {batch.size}: {batch.tok_s.text('tok/s')} together, at context {batch.context}")
    print(
        f"this machine at best: {ceilings.read_gb_s.text('GB/s')} ({ceilings.how}), "
        f"{ceilings.gemm_gop_s.text('Gop/s')} in torch's 16-bit matmul"
    )
    for note in report.notes:
        print(f"note: {note}")


def show_memory(report: MemoryReport) -> None:
    """Print a memory report as a table and lines."""
    from qvl_runtime.profile.memory import GIB

    rows = [
        {
            "case": f"{case.name} {case.tokens or ''}".strip(),
            "peak, GiB": f"{case.peak / GIB:.2f}",
            "planned": "" if case.planned is None else f"{case.planned / GIB:.2f}",
            "original, A100-80G": "" if case.published_gib is None else f"{case.published_gib:.2f}",
            "how": case.how,
        }
        for case in report.cases
    ]
    show_table(f"{report.counted}, {report.weights}", rows)
    parts = ", ".join(f"{name} {size / GIB:.3f}" for name, size in report.parts.items())
    kv = f"KV: {report.kv_per_token:,} bytes per token"
    print(f"before the model: {report.base / GIB:.2f} GiB; weights, GiB: {parts}; {kv}")
    for note in report.notes:
        print(f"note: {note}")


def show_table(title: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Print rows as a table with a title; the keys of the first row are the headings."""
    from rich.table import Table

    if not rows:
        return
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name)
    for row in rows:
        table.add_row(*row.values())
    print_table(table)


def _parse_numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"batch is {text!r}; expected whole numbers of 1 or more, such as 1,2,4")
    return numbers


def _progress(task: str) -> None:
    if sys.stderr.isatty():
        say(f"{task} …")


add_command(profile_app, speed)
add_command(profile_app, memory)
