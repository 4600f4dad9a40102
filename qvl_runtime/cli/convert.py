"""`qvl convert`: repack a checkpoint for the kernels of a CPU or GPU, or restore the published files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvl_runtime.cli.options import Debug, Download, Hub, Quiet, model_folder
from qvl_runtime.cli.terminal import progress_bar, say, size
from qvl_runtime.errors import ConfigError

if TYPE_CHECKING:
    from qvl_runtime.convert.recipes import ConvertOptions


def convert(
    *,
    source: Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint folder, or a hub id.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The folder to create.")],
    to: Annotated[
        str,
        typer.Option("--target", "--to", metavar="NAME", help="cpu or cuda; hf restores the published files."),
    ] = "cpu",
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="Dtype of the tensors that stay floating point: auto, float16, …")
    ] = "auto",
    vision: Annotated[
        str, typer.Option(metavar="NAME", help="keep, or int8: a vision encoder of half the size.")
    ] = "keep",
    head: Annotated[str, typer.Option(metavar="NAME", help="The output head: keep, int8 or int4.")] = "keep",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done; write nothing.")] = False,
    download: Download = False,
    hub: Hub = "huggingface",
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Repack a checkpoint for the kernels of a CPU or GPU, once, so that later starts take about a second.

    If interrupted, rerun the same command to resume. --to hf restores the published files from a converted folder.

    [cyan]qvl convert Qwen/Qwen-VL-Chat-Int4 ./chat-int4-cpu[/cyan]

    [cyan]qvl convert ./my-finetune ./my-finetune-cpu --vision int8 --head int8[/cyan]

    [cyan]qvl convert ./chat-int4-cpu ./chat-int4-restored --to hf[/cyan]
    """
    options = convert_options(to, dtype, vision, head)
    folder = model_folder(source, download, hub)
    if options is None:
        return _restore(folder, destination, quiet)
    return _convert(folder, destination, options, dry_run, quiet)


def convert_options(target: str, dtype: str, vision: str, head: str) -> ConvertOptions | None:
    """The options of a conversion; None for `--to hf`, which accepts none. Raises `ConfigError`."""
    from qvl_runtime.convert.recipes import ConvertOptions

    if target != "hf":
        return ConvertOptions(target=target, dtype=dtype, vision=vision, head=head)
    changed = [
        option
        for option, value in (("--dtype", dtype), ("--vision", vision), ("--head", head))
        if value not in ("auto", "keep")
    ]
    if changed:
        raise ConfigError(f"--to hf restores the published files, so {changed[0]} cannot apply: drop it")
    return None


def _convert(source: Path, destination: Path, options: ConvertOptions, dry_run: bool, quiet: bool) -> int:
    from qvl_runtime.convert.convert import convert as convert_checkpoint
    from qvl_runtime.convert.convert import estimate

    plan = estimate(source, destination, options)
    if dry_run:
        print(
            f"{source} ({size(plan.source_bytes)}) would become {destination} for {options.target}: about "
            f"{size(plan.bytes)}, {plan.packed} linears repacked for the kernels, {plan.unpacked} tensors copied as "
            f"{plan.dtype}; {size(plan.free)} of disk space is free. Nothing was written."
        )
        return 0
    began = time.perf_counter()
    with progress_bar(destination.name, plan.source_bytes, shown=not quiet, in_bytes=True) as advance:
        manifest = convert_checkpoint(source, destination, options, advance)
    if not quiet:
        seconds = time.perf_counter() - began
        say(
            f"{destination}: {len(manifest.linears)} linears repacked for {manifest.target}, "
            f"{_files(len(manifest.shards))}, in {seconds:.1f} s ({plan.source_bytes / seconds / 1e6:,.0f} MB/s)"
        )
    return 0


def _restore(source: Path, destination: Path, quiet: bool) -> int:
    from qvl_runtime.convert.restore import restore
    from qvl_runtime.weights.manifest import Manifest

    total = sum(file.bytes for file in Manifest.read(source).sources.values())
    with progress_bar(destination.name, total, shown=not quiet, in_bytes=True) as advance:
        files = restore(source, destination, advance)
    if not quiet and files.exact:
        say(f"{destination}: {_files(len(files.exact))}, identical to the converted originals (SHA-256)")
    if not quiet and files.tensors_only:
        say(f"{destination}: {_files(len(files.tensors_only))} with the tensors of another format, now safetensors")
    return 0


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"
