"""Options that several commands share: single ones, and groups as dataclasses that build what they describe."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from qvl_runtime.cli.sampling_options import SAMPLING as SAMPLING
from qvl_runtime.cli.sampling_options import SamplingOptions as SamplingOptions
from qvl_runtime.cli.terminal import working
from qvl_runtime.config.checks import LARGEST_INT
from qvl_runtime.engine.records import user_message as user_message
from qvl_runtime.errors import quoted

if TYPE_CHECKING:
    from qvl_runtime.engine.engine import Engine
    from qvl_runtime.weights.hub import Source

MODEL, MEMORY, IMAGES, OUTPUT = "Model", "Memory", "Images", "Output"  # help panels
DEFAULT_MODEL = "the small checkpoint that ships with qvl"

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=OUTPUT)]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print only results and errors.", rich_help_panel=OUTPUT),
]
Images = Annotated[
    list[str] | None,
    typer.Option("--image", "-i", metavar="IMAGE", help="A file, http(s) URL or data URL; repeat for several images."),
]
System = Annotated[
    str | None, typer.Option(metavar="TEXT", help="System message. Default: 'You are a helpful assistant.'")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.", rich_help_panel=OUTPUT)]
Download = Annotated[
    bool, typer.Option("--download", help="Download the model if it is not cached.", rich_help_panel=MODEL)
]
Hub = Annotated[
    str,
    typer.Option(
        "--source", metavar="HUB", help="Hub to download from: huggingface or modelscope.", rich_help_panel=MODEL
    ),
]
Font = Annotated[
    Path | None,
    typer.Option(
        "--font", metavar="FILE", help="Font of drawn labels. Default: an installed one.", rich_help_panel=OUTPUT
    ),
]

_COUNT = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(?:(k|M|G|T)(i?))?B?", re.IGNORECASE)
_DIGITS = 100  # of a number: more than any has, and fewer than Python reads
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}


def parse_count(text: str) -> int:
    """A number with a unit: 48M, 1.5k, 20MiB (of 1024). Raises typer's error for anything else."""
    match = _COUNT.fullmatch(str(text).strip().replace(",", "").replace("_", ""))
    if match is None:
        raise typer.BadParameter(f"{text!r} is no number; expected one such as 500000, 48M or 20MiB")
    number, prefix, binary = match.groups()
    unit = (1024 if binary else 1000) ** _POWERS[prefix.lower()] if prefix else 1
    count = round(Fraction(number) * unit) if len(number) <= _DIGITS else math.inf
    if count > LARGEST_INT:
        raise typer.BadParameter(f"{quoted(text)} is too large; expected at most {LARGEST_INT}")
    return int(count)


def count_option(help: str, panel: str | None = None) -> Any:
    """An option for a number of bytes, pixels or tokens, with a unit if wanted."""
    return typer.Option(parser=parse_count, metavar="N", help=help, rich_help_panel=panel)


def model_folder(name: str | Path, download: bool, hub: str) -> Path:
    """The folder of a model, downloaded first if asked. Raises `CheckpointError` or `DownloadError`."""
    from qvl_runtime.weights.hub import resolve_model

    return resolve_model(name, download=download, source=cast("Source", hub))


@dataclass(frozen=True)
class ModelOptions:
    """Which checkpoint to run, on what device and in what precision: fields of `Engine`."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            help=f"A checkpoint folder or a hub id such as Qwen/Qwen-VL-Chat-Int4. Default: {DEFAULT_MODEL}.",
            rich_help_panel=MODEL,
        ),
    ] = None
    download: Download = False
    source: Hub = "huggingface"
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
            help="exact, or fast (int8 activations, head and vision encoder where the device has kernels for them).",
            rich_help_panel=MODEL,
        ),
    ] = "exact"
    batch_invariant: Annotated[
        bool,
        typer.Option(
            "--batch-invariant",
            help="On a GPU: the same bits alone and in any batch, at a cost. A CPU gives them always.",
            rich_help_panel=MODEL,
        ),
    ] = False
    tensor_parallel: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Split the decoder among N processes, each on a device of its own. Default: 1.",
            rich_help_panel=MODEL,
        ),
    ] = 1
    embedding_on_host: Annotated[
        bool,
        typer.Option(
            "--embedding-on-host",
            help="Keep the embedding table in host memory, to save GPU memory.",
            rich_help_panel=MODEL,
        ),
    ] = False
    synthetic: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Random full-size weights for benchmarks: qwen-vl-chat or qwen-vl-chat-int4. Answers are noise.",
            rich_help_panel=MODEL,
        ),
    ] = None

    def folder(self) -> Path:
        """The checkpoint folder, downloaded first with `--download`. Raises `CheckpointError` or `DownloadError`."""
        from qvl_runtime.engine.engine import NANO

        return model_folder(self.model or NANO, self.download, self.source)

    def open(self) -> Engine:
        """Load the model, with a spinner if standard error is a terminal."""
        with working(f"loading {self.model or DEFAULT_MODEL}"):
            from qvl_runtime.engine.engine import Engine

            return Engine(**self.values())

    def values(self) -> dict[str, Any]:
        """The arguments of `Engine` that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class RunOptions(ModelOptions):
    """Which checkpoint to run, and how much memory it may take: fields of `Engine`, too. None is its default."""

    max_model_len: Annotated[
        int | None, count_option("Longest prompt and answer, in tokens. Default: the model's.", MEMORY)
    ] = None
    kv_cache_bytes: Annotated[
        int | None, count_option("KV cache of all requests, such as 4GiB. Default: from what is free.", MEMORY)
    ] = None
    kv_dtype: Annotated[
        str, typer.Option(metavar="NAME", help="auto, or int8: a KV cache of half the size.", rich_help_panel=MEMORY)
    ] = "auto"
    max_running: Annotated[int | None, count_option("Requests that are computed together. Default: 64.", MEMORY)] = None
    max_step_tokens: Annotated[
        int | None, count_option("Tokens of a step; fewer need less memory. Default: 1024.", MEMORY)
    ] = None
    image_cache_bytes: Annotated[int | None, count_option("Cache of encoded images. Default: 256MiB.", MEMORY)] = None


@dataclass(frozen=True)
class ReadingOptions(RunOptions):
    """Which checkpoint to run, and how it reads images: fields of `Engine`, too."""

    max_image_pixels: Annotated[
        int | None, count_option("Largest image, width x height. Default: 67,108,864.", IMAGES)
    ] = None
    max_image_bytes: Annotated[int | None, count_option("Largest image file. Default: 20MiB.", IMAGES)] = None
    max_image_side: Annotated[
        int | None, count_option("Longest side of an image, in pixels. Default: 65,535.", IMAGES)
    ] = None
    max_images: Annotated[int | None, count_option("Images of one prompt. Default: 16.", IMAGES)] = None
    max_request_pixels: Annotated[
        int | None, count_option("Pixels of all images of a prompt. Default: 268,435,456.", IMAGES)
    ] = None
    image_timeout_s: Annotated[
        float | None,
        typer.Option(
            metavar="S", help="Seconds to download and decode one image in. Default: 10.", rich_help_panel=IMAGES
        ),
    ] = None
    isolate_images: Annotated[
        bool | None,
        typer.Option(
            "--isolate-images/--no-isolate-images",
            help="Decode images in processes of their own, limited in time and memory, as is the default.",
            rich_help_panel=IMAGES,
            show_default=False,
        ),
    ] = None
    transparency: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Alpha channels: drop, as in training, or white, to put images on white.",
            rich_help_panel=IMAGES,
        ),
    ] = "drop"
    exif_orientation: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Photos stored turned: ignore, as in training, or apply, to turn them and their boxes.",
            rich_help_panel=IMAGES,
        ),
    ] = "ignore"
    deep_pixels: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="More than 8 bits: white is the end of the range, or stretch, from darkest to brightest.",
            rich_help_panel=IMAGES,
        ),
    ] = "range"


@dataclass(frozen=True)
class EngineOptions(ReadingOptions):
    """Which checkpoint to run, and which of the user's images it reads and how: fields of `Engine`, too."""

    allow_files: Annotated[
        bool,
        typer.Option("--files/--no-files", help="Whether images may be paths on this machine.", rich_help_panel=IMAGES),
    ] = True
    allow_urls: Annotated[
        bool,
        typer.Option("--urls/--no-urls", help="Whether images may be http(s) URLs.", rich_help_panel=IMAGES),
    ] = True
    allow_private_addresses: Annotated[
        bool,
        typer.Option(
            "--allow-private-addresses",
            help="Fetch URLs on this machine and inside its network, too.",
            rich_help_panel=IMAGES,
        ),
    ] = False
