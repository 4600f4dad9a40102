"""`qvl batch --ray`: the same requests on a Ray cluster, into a folder of parts."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvl_runtime.cli.options import EngineOptions
from qvl_runtime.cli.terminal import FAILED_RECORDS, progress_bar, rate, say
from qvl_runtime.errors import ClusterError

if TYPE_CHECKING:
    from qvl_runtime.cluster.pool import ActorPool
    from qvl_runtime.schedule.api import SamplingParams

RAY = "Ray"


@dataclass(frozen=True)
class RayOptions:
    """Whether a batch runs on a Ray cluster, and with how much of it."""

    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Run on a Ray cluster: host:port, auto, or local for this machine. OUT is a folder then.",
            rich_help_panel=RAY,
        ),
    ] = None
    ray_actors: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Engines. Default: one a GPU, or without GPUs one a node.", rich_help_panel=RAY
        ),
    ] = None
    ray_threads: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="CPU threads of an engine. Default: what its node has.", rich_help_panel=RAY
        ),
    ] = None
    ray_wait_s: Annotated[
        float, typer.Option(min=0, metavar="S", help="Seconds to wait for a free GPU or CPU.", rich_help_panel=RAY)
    ] = 60.0


def run_on_ray(
    requests: Path,
    answers: Path,
    models: EngineOptions,
    params: SamplingParams,
    options: RayOptions,
    max_line_bytes: int,
    quiet: bool,
    say_error: Callable[[str], str],
) -> int:
    """Answer a file on a cluster; returns the exit code."""
    from qvl_runtime.cluster.batch import Job
    from qvl_runtime.cluster.connect import disconnect

    engine = models.values()
    settings = {"engine": _plain(engine), "params": _plain(asdict(params)), "max_line_bytes": max_line_bytes}
    with closing(Job(requests, answers, settings, max_line_bytes)) as job:
        before, total = job.progress, job.survey.rows
        if before.done and not quiet:
            say(f"{before.done} of {total} requests already answered in {answers}{_errors(before.errors)}")
        if job.is_complete:
            return FAILED_RECORDS if before.errors else 0

        def open_pool() -> ActorPool:
            return _open_pool(requests, engine, params, options, max_line_bytes, quiet)

        began = time.perf_counter()
        room = 2 * int(engine.get("max_running", 64))
        with progress_bar(answers.name, total, before.done, shown=not quiet) as advance:
            for progress in job.run(open_pool, room, say_error):
                advance(progress.done)
        after, seconds = job.progress, time.perf_counter() - began
    if not quiet:
        lost = f"; {after.lost} actors died" if after.lost else ""
        errors = _errors(after.errors - before.errors)
        say(f"wrote {after.done - before.done} answers{errors} to {answers} in {seconds:.1f} s{lost}")
        say(f"{after.tokens} tokens at {rate(after.tokens / seconds)}")
    disconnect()
    return FAILED_RECORDS if after.errors else 0


def _open_pool(
    requests: Path,
    engine: dict[str, Any],
    params: SamplingParams,
    options: RayOptions,
    max_line_bytes: int,
    quiet: bool,
) -> ActorPool:
    from qvl_runtime.cluster.actor import ActorSpec
    from qvl_runtime.cluster.connect import LOCAL, connect
    from qvl_runtime.cluster.pool import ActorPool

    address = options.ray or LOCAL
    threads, wanted = options.ray_threads, options.ray_actors
    cpus = threads * wanted if address == LOCAL and threads and wanted else None
    ray = connect(address, cpus)
    gpus = 0 if str(engine.get("device", "auto")) == "cpu" else int(ray.cluster_resources().get("GPU", 0))
    if not gpus and str(engine.get("device", "auto")).startswith("cuda"):
        raise ClusterError("no node of the cluster has a GPU, which --device asks for")
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    cores = int(min((count for count in nodes if count), default=1))
    if threads is None:
        threads = max(1, cores // -(-(wanted or 1) // max(1, len(nodes)))) if not gpus else None
    actors = wanted or gpus or len([count for count in nodes if count]) or 1
    spec = ActorSpec(engine, params, str(requests), max_line_bytes, threads, str(Path.cwd()))
    if not quiet:
        each = "a GPU" if gpus else f"{threads} CPU threads"
        say(f"starting {actors} engines, {each} each, on {len(nodes)} nodes")
    return ActorPool(ray, spec, actors, 1 if gpus else 0, 1 if gpus else float(threads or 1), options.ray_wait_s)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """What JSON can hold, of values that are set."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _errors(count: int) -> str:
    return f" ({count} of them errors)" if count else ""
