"""The options that several commands share, each group a dataclass that knows what to make of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_type_hints

import typer

from qvl_runtime.cli.terminal import working

if TYPE_CHECKING:
    from qvl_runtime.engine.engine import Engine
    from qvl_runtime.schedule.api import SamplingParams
    from qvl_runtime.weights.hub import Source

MODEL, SAMPLING, OUTPUT = "Model", "Sampling", "Output"
SMALL = "the small checkpoint that comes with qvl"

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object, for programs.", rich_help_panel=OUTPUT)]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="The answer only: no notes, no speed.", rich_help_panel=OUTPUT)
]
Debug = Annotated[bool, typer.Option("--debug", help="On an error show the whole traceback.", rich_help_panel=OUTPUT)]


@dataclass(frozen=True)
class ModelOptions:
    """Which checkpoint runs, and on what."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            help=f"A checkpoint folder or a hub id such as Qwen/Qwen-VL-Chat-Int4. Without it: {SMALL}.",
            rich_help_panel=MODEL,
        ),
    ] = None
    download: Annotated[
        bool, typer.Option("--download", help="Fetch a hub id that is not here yet.", rich_help_panel=MODEL)
    ] = False
    source: Annotated[
        str, typer.Option(metavar="HUB", help="The hub: huggingface or modelscope.", rich_help_panel=MODEL)
    ] = "huggingface"
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda or cuda:N.", rich_help_panel=MODEL)] = (
        "auto"
    )
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="auto, float32, bfloat16 or float16.", rich_help_panel=MODEL)
    ] = "auto"
    precision: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="exact, or fast: int8 activations, head and vision, where the device has kernels for it.",
            rich_help_panel=MODEL,
        ),
    ] = "exact"

    embedding_on_host: Annotated[
        bool,
        typer.Option(
            "--embedding-on-host",
            help="Leave the embedding table in the host's mapped file: less GPU memory.",
            rich_help_panel=MODEL,
        ),
    ] = False
    synthetic: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Random weights of the size of qwen-vl-chat or qwen-vl-chat-int4, to measure; its answers are noise.",
            rich_help_panel=MODEL,
        ),
    ] = None

    def folder(self) -> Path:
        """Where the checkpoint lies, downloaded if that was asked for."""
        from qvl_runtime.engine.engine import NANO
        from qvl_runtime.weights.hub import resolve_model

        return resolve_model(self.model or NANO, download=self.download, source=cast("Source", self.source))

    def open(self) -> Engine:
        """Load the model, with a spinner where someone is watching."""
        with working(f"loading {self.model or SMALL}"):
            from qvl_runtime.engine.engine import Engine

            return Engine(**asdict(self))


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen; what is not given is left to the checkpoint's defaults."""

    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Stop after this many tokens.", rich_help_panel=SAMPLING)
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option(metavar="X", help="0 always takes the likeliest token.", rich_help_panel=SAMPLING),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(metavar="X", help="Draw from the likeliest that sum to this.", rich_help_panel=SAMPLING),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(metavar="N", help="Draw from this many of the likeliest; 0: all.", rich_help_panel=SAMPLING),
    ] = None
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="The same seed draws the same answer.", rich_help_panel=SAMPLING)
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End before this text. Repeat for several.", rich_help_panel=SAMPLING),
    ] = None

    def params(self) -> SamplingParams:
        """Checked here, before a model is loaded. Raises `SamplingError`."""
        from qvl_runtime.schedule.api import SamplingParams

        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=tuple(self.stop or ()),
        )


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Spread each parameter that is one of these dataclasses into its fields, for typer to see as options."""
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if is_dataclass(hint) and isinstance(hint, type)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if (group := groups.get(parameter.name)) is None:
            parameters.append(parameter.replace(annotation=hints[parameter.name], kind=parameter.KEYWORD_ONLY))
            continue
        of_field = get_type_hints(group, include_extras=True)
        parameters += [
            inspect.Parameter(f.name, parameter.KEYWORD_ONLY, default=f.default, annotation=of_field[f.name])
            for f in fields(group)
        ]

    @wraps(command)
    def run(**values: Any) -> None:
        built = {name: group(**{f.name: values.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        command(**values, **built)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del run.__wrapped__
    return run
