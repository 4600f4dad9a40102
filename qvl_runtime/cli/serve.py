"""`qvl serve`: answer OpenAI's API over HTTP, with images in and boxes out."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvl_runtime.cli.options import Debug, ReadingOptions, RunOptions, count_option
from qvl_runtime.cli.serve_ray import ServeRayOptions, run_on_ray
from qvl_runtime.cli.terminal import INTERRUPTED, say
from qvl_runtime.errors import ConfigError, quoted

if TYPE_CHECKING:
    from qvl_runtime.engine.engine import Engine
    from qvl_runtime.server.config import ServerConfig

SERVER, LIMITS, ACCESS = "Server", "Limits", "Access"
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class ServeOptions:
    """Where the server listens, who may use it, and how much it takes: fields of `ServerConfig`, too."""

    host: Annotated[str, typer.Option(metavar="NAME", help="Address to listen at.", rich_help_panel=SERVER)] = (
        "127.0.0.1"
    )
    port: Annotated[int, typer.Option(metavar="N", help="Port; 0 is any that is free.", rich_help_panel=SERVER)] = 8000
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Id of the model; repeat for several. Default: its name.", rich_help_panel=SERVER
        ),
    ] = None
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR", help="A LoRA adapter that requests use as a model; repeatable.", rich_help_panel=SERVER
        ),
    ] = None
    any_model: Annotated[
        bool, typer.Option("--any-model", help="Answer whatever model a request names.", rich_help_panel=SERVER)
    ] = False
    metrics: Annotated[
        bool | None,
        typer.Option(
            "--metrics/--no-metrics",
            help="Prometheus metrics at /metrics. Default: if it listens at this machine only, or has keys.",
            rich_help_panel=SERVER,
            show_default=False,
        ),
    ] = None
    page: Annotated[bool, typer.Option("--page/--no-page", help="The web page at /.", rich_help_panel=SERVER)] = True
    access_log: Annotated[
        bool,
        typer.Option("--access-log/--no-access-log", help="One line of JSON a request.", rich_help_panel=SERVER),
    ] = True
    exit_on_failure: Annotated[
        bool,
        typer.Option("--exit-on-failure", help="End if the model's thread ends by an error.", rich_help_panel=SERVER),
    ] = False
    drain_s: Annotated[
        float,
        typer.Option(metavar="S", help="Seconds for running requests after SIGTERM.", rich_help_panel=SERVER),
    ] = 30.0
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="API keys, one on each line, then a name.", rich_help_panel=ACCESS),
    ] = None
    without_keys: Annotated[
        bool,
        typer.Option("--without-keys", help="Let everyone use it who reaches it.", rich_help_panel=ACCESS),
    ] = False
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Host name that requests may use; repeat for several. Default without keys: this machine's own.",
            rich_help_panel=ACCESS,
        ),
    ] = None
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL", help="Origin whose web pages may use it; repeat for several.", rich_help_panel=ACCESS
        ),
    ] = None
    trusted_proxies: Annotated[
        str | None,
        typer.Option(
            metavar="LIST", help="Addresses of proxies whose X-Forwarded-For is logged.", rich_help_panel=ACCESS
        ),
    ] = None
    image_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-urls",
            metavar="HOST",
            help="Host of http(s) images; repeat for several. *.example.com: its subdomains. Default: none.",
            rich_help_panel=ACCESS,
        ),
    ] = None
    allow_private_addresses: Annotated[
        bool,
        typer.Option(
            "--allow-private-addresses",
            help="Fetch from those hosts also inside this network.",
            rich_help_panel=ACCESS,
        ),
    ] = False
    max_waiting: Annotated[int, count_option("Requests that may wait, beyond those that run together.", LIMITS)] = 192
    max_body_bytes: Annotated[
        int | None, count_option("Longest body. Default: what the images of a request take.", LIMITS)
    ] = None
    max_answer_tokens: Annotated[
        int | None, count_option("Longest answer. Default: what the context has left.", LIMITS)
    ] = None
    max_answers: Annotated[int, count_option("Largest n of a request.", LIMITS)] = 16
    request_timeout_s: Annotated[
        float | None,
        typer.Option(metavar="S", help="Seconds after which an answer ends as it is.", rich_help_panel=LIMITS),
    ] = None

    def image_sources(self) -> dict[str, Any]:
        """Where images may come from, as fields of `Engine`: never from files of this machine."""
        hosts, private = tuple(self.image_host or ()), self.allow_private_addresses
        return {"allow_files": False, "allow_urls": hosts or False, "allow_private_addresses": private}

    def adapters(self) -> dict[str, Path]:
        """The folder of each adapter by its name. Raises `ConfigError` for one that is not NAME=DIR."""
        folders: dict[str, Path] = {}
        for text in self.adapter or ():
            name, equals, folder = text.partition("=")
            if not (name and equals and folder) or name in folders:
                raise ConfigError(f"adapter is {quoted(text)}; expected NAME=DIR, each name once")
            folders[name] = Path(folder)
        return folders

    def config(self, names: tuple[str, ...]) -> ServerConfig:
        """The server's options. Raises `ConfigError`, also for a server that everyone could use unasked."""
        from qvl_runtime.server.config import ServerConfig, is_loopback

        if not 0 <= self.port <= 65535:  # getaddrinfo takes the lowest 16 bits
            raise ConfigError(f"--port is {self.port}; expected 0 to 65535")
        local, keys = is_loopback(self.host), self.api_key_file is not None
        if not (local or keys or self.without_keys):
            raise ConfigError(
                f"{self.host} can be reached from other machines: give keys by --api-key-file, or --without-keys"
            )
        hosts = tuple(self.allowed_host) if self.allowed_host else None
        if hosts is None and local and not keys:
            hosts = tuple(dict.fromkeys((*_LOCAL_NAMES, self.host)))
        known = {field.name for field in fields(ServerConfig)} & {field.name for field in fields(self)}
        values: dict[str, Any] = {name: getattr(self, name) for name in known}
        values["metrics"] = (local or keys) if self.metrics is None else self.metrics
        return ServerConfig(
            **values,
            model_names=names,
            adapters=tuple(self.adapters()),
            cors_origins=tuple(self.cors_origin or ()),
            hosts=hosts,
        )


def serve(
    *,
    checkpoint: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A checkpoint folder or a hub id. Default: the small one of qvl."),
    ] = None,
    serving: ServeOptions,
    models: ReadingOptions,
    cluster: ServeRayOptions,
    debug: Debug = False,
) -> int:
    """Answer OpenAI's API over HTTP: chat and completions, streams, images, boxes.

    [cyan]qvl serve Qwen/Qwen-VL-Chat-Int4 --download[/cyan]

    [cyan]qvl serve --host 0.0.0.0 --api-key-file keys.txt --allow-urls images.example.com[/cyan]

    Point any client at http://127.0.0.1:8000/v1. Images are data URLs; files of this machine are never read.

    SIGTERM and Ctrl-C end it once the running requests are answered, a second one at once.
    """
    if checkpoint is not None and models.model is not None:
        raise ConfigError("the model is given twice: as an argument and by --model")
    models = replace(models, model=checkpoint or models.model)
    if cluster.ray is None and not cluster.ray_config:
        return run(serving, models)
    config, keys = serving.config(_names(serving, models)), serving.api_key_file
    if models.model is not None and models.download:
        models.folder()
    engine = {**models.values(), **serving.image_sources(), "adapters": serving.adapters()}
    return run_on_ray(cluster, engine, config, keys, serving.host, serving.port, serving.access_log)


def run(serving: ServeOptions, models: RunOptions, look: Callable[[str], object] | None = None) -> int:
    """Serve until a signal ends it; returns the exit status. look: called with the URL once it listens."""
    try:
        from qvl_runtime.server.launch import serve as run_server
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed: pip install 'qvl-runtime[server]'") from None
    from qvl_runtime.server.keys import Keys
    from qvl_runtime.server.middleware import standard_output

    names = _names(serving, models)
    config, keys = serving.config(names), Keys(serving.api_key_file)
    if models.model is not None:
        models.folder()  # so that a wrong name is an error before anything listens

    def load() -> Engine:
        from qvl_runtime.engine.engine import Engine

        return Engine(**models.values(), **serving.image_sources(), adapters=serving.adapters())

    def ready(engine: Engine) -> None:
        say(f"ready: {engine.summary()}")

    def announce(url: str) -> None:
        say(f"listening at {url}, loading {names[0]}")
        if look is not None:
            look(url)

    write = standard_output if serving.access_log else None
    place = serving.host, serving.port
    ended_by = run_server(load, config, keys, *place, write, serving.trusted_proxies, announce, ready)
    return INTERRUPTED if ended_by == signal.SIGINT else 0


def _names(serving: ServeOptions, models: RunOptions) -> tuple[str, ...]:
    return tuple(serving.served_model_name or ()) or (_name(models.model or models.synthetic),)


def _name(model: str | None) -> str:
    """The id of a model: the last part of a folder's path, or its hub id."""
    if model is None:
        return "nano"
    return Path(model).resolve().name if Path(model).exists() else model
