"""What `qvl convert` and `qvl verify` do and say."""

from __future__ import annotations

import time
from pathlib import Path

from qvl_runtime.cli.terminal import progress_bar, say, size
from qvl_runtime.convert.recipes import ConvertOptions
from qvl_runtime.errors import CheckpointError, ConfigError


def run_convert(
    source: Path, destination: Path, options: ConvertOptions, dry_run: bool = False, quiet: bool = False
) -> int:
    """Convert, with a bar; with `dry_run` say what would be done."""
    from qvl_runtime.convert.convert import convert, outline

    plan = outline(source, destination, options)
    if dry_run:
        print(
            f"{source} ({size(plan.source_bytes)}) would become {destination} for {options.target}: about "
            f"{size(plan.bytes)}, {plan.packed} linears laid out for the kernels, {plan.unpacked} tensors as they are "
            f"in {plan.dtype}; its disk has {size(plan.free)} free. Nothing was written."
        )
        return 0
    began = time.perf_counter()
    with progress_bar(destination.name, plan.source_bytes, shown=not quiet, in_bytes=True) as advance:
        manifest = convert(source, destination, options, advance)
    if not quiet:
        took = time.perf_counter() - began
        say(
            f"{destination}: {len(manifest.linears)} linears laid out for {manifest.target}, "
            f"{_files(len(manifest.shards))}, in {took:.1f} s ({plan.source_bytes / took / 1e6:,.0f} MB/s)"
        )
    return 0


def run_restore(source: Path, destination: Path, quiet: bool = False) -> int:
    """Back to the published layout, with a bar."""
    from qvl_runtime.convert.restore import restore
    from qvl_runtime.weights.manifest import Manifest

    total = sum(file.bytes for file in Manifest.read(source).sources.values())
    with progress_bar(destination.name, total, shown=not quiet, in_bytes=True) as advance:
        files = restore(source, destination, advance)
    if not quiet and files.exact:
        say(f"{destination}: {_files(len(files.exact))}, byte for byte what was converted (SHA-256)")
    if not quiet and files.tensors_only:
        say(f"{destination}: {_files(len(files.tensors_only))} with the tensors of another format, now safetensors")
    return 0


def run_verify(folder: Path, quiet: bool = False) -> int:
    """Compare a converted checkpoint with its manifest; raises `CheckpointError` that names what is not as written."""
    from qvl_runtime.convert.verify import verify
    from qvl_runtime.weights.manifest import MANIFEST

    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    began = time.perf_counter()
    with progress_bar(folder.name, total, shown=not quiet, in_bytes=True) as advance:
        found = verify(folder, advance)
    if found.faults:
        more = f" and {len(found.faults) - 3} more" if len(found.faults) > 3 else ""
        raise CheckpointError(
            f"{folder} is not as it was written: {'; '.join(found.faults[:3])}{more}: convert the source anew"
        )
    if not quiet:
        took = time.perf_counter() - began
        say(f"{folder}: {found.tensors} tensors, {size(found.bytes)}, all as {MANIFEST} says, in {took:.1f} s")
    return 0


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def target_of(name: str, given: dict[str, str]) -> ConvertOptions | None:
    """The options of a conversion; None for the way back, which takes none."""
    if name != "hf":
        return ConvertOptions(**given, target=name)
    chosen = [f"--{key}" for key, value in given.items() if value not in ("auto", "keep")]
    if chosen:
        raise ConfigError(f"--to hf gives back what was published, so it takes no {chosen[0]}")
    return None
