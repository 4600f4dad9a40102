"""`qvl serve --ray`: the same server as replicas of a Ray Serve application."""

from __future__ import annotations

import signal
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvl_runtime.cli.batch_ray import RAY
from qvl_runtime.cli.terminal import INTERRUPTED, say
from qvl_runtime.errors import ClusterError

if TYPE_CHECKING:
    from qvl_runtime.cluster.deployment import Deployment
    from qvl_runtime.server.config import ServerConfig


@dataclass(frozen=True)
class ServeRayOptions:
    """Whether a server runs on a Ray cluster, and with how much of it."""

    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Run on a Ray cluster: host:port, auto, or local for this machine.",
            rich_help_panel=RAY,
        ),
    ] = None
    ray_replicas: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Engines. Default: one a GPU, or one.", rich_help_panel=RAY),
    ] = None
    ray_threads: Annotated[
        int, typer.Option(min=1, metavar="N", help="CPU threads of an engine without a GPU.", rich_help_panel=RAY)
    ] = 1
    ray_bound: Annotated[
        float,
        typer.Option(
            min=1,
            metavar="X",
            help="Requests of an engine, against the mean, beyond which pictures go to others.",
            rich_help_panel=RAY,
        ),
    ] = 1.25
    ray_wait_s: Annotated[
        float, typer.Option(min=0, metavar="S", help="Seconds until the first engine is ready.", rich_help_panel=RAY)
    ] = 600.0
    ray_config: Annotated[
        bool,
        typer.Option("--ray-config", help="Print the file for `serve deploy`, and end.", rich_help_panel=RAY),
    ] = False


def run_on_ray(
    options: ServeRayOptions,
    engine: dict[str, Any],
    config: ServerConfig,
    keys: Path | None,
    host: str,
    port: int,
    access_log: bool,
) -> int:
    """Serve on a cluster until a signal ends it, or print what would be deployed; returns the exit code."""
    from qvl_runtime.cluster.connect import connect, import_ray
    from qvl_runtime.cluster.deployment import Deployment, config_file, run

    server = asdict(config) | {"metrics": False}  # it would be one replica's; Ray has metrics of its own
    on_cpu = str(engine.get("device", "auto")) == "cpu"

    def deployment(gpus: int) -> Deployment:
        return Deployment(
            engine=engine,
            server=server,
            keys=None if keys is None else str(keys.resolve()),
            replicas=options.ray_replicas or gpus or 1,
            gpus=1 if gpus else 0,
            cpus=1 if gpus else options.ray_threads,
            threads=None if gpus else options.ray_threads,
            bound=options.ray_bound,
            access_log=access_log,
        )

    if options.ray_config:
        import_ray()
        print(config_file(deployment(0 if on_cpu else options.ray_replicas or 1), host, port), end="")
        return 0
    wanted = options.ray_threads * (options.ray_replicas or 1) + 1
    ray = connect(options.ray or "local", wanted)
    gpus = 0 if on_cpu else int(ray.cluster_resources().get("GPU", 0))
    if not gpus and str(engine.get("device", "auto")).startswith("cuda"):
        raise ClusterError("no node of the cluster has a GPU, which --device asks for")
    made = deployment(gpus)
    say(f"starting {made.replicas} engines, {'a GPU' if gpus else f'{made.threads} CPU threads'} each")
    ended_by: list[int] = []
    over = threading.Event()

    def end(number: int, frame: object) -> None:
        ended_by.append(number)
        over.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    with run(ray, made, host, port, options.ray_wait_s, over):
        if not over.is_set():
            say(f"ready: http://{host}:{port}, {made.replicas} engines")
        over.wait()
    return INTERRUPTED if ended_by[0] == signal.SIGINT else 0
