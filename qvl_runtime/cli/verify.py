"""`qvl verify`: compare a converted checkpoint with its manifest."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from qvl_runtime.cli.options import Debug, Quiet
from qvl_runtime.cli.terminal import progress_bar, say, size
from qvl_runtime.errors import CheckpointError


def verify(
    *,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that `qvl convert` wrote.")],
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Check a converted checkpoint against its manifest and name every tensor that differs.

    This finds damage. It cannot tell who made the folder: checksums are not a signature.

    [cyan]qvl verify ./chat-int4-cpu[/cyan]
    """
    from qvl_runtime.convert.verify import verify as verify_checkpoint
    from qvl_runtime.weights.manifest import MANIFEST

    total = sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file())
    began = time.perf_counter()
    with progress_bar(folder.name, total, shown=not quiet, in_bytes=True) as advance:
        result = verify_checkpoint(folder, advance)
    if result.faults:
        more = f" and {len(result.faults) - 3} more" if len(result.faults) > 3 else ""
        raise CheckpointError(
            f"{folder} differs from what was written: {'; '.join(result.faults[:3])}{more}: convert the source again"
        )
    if not quiet:
        seconds = time.perf_counter() - began
        say(f"{folder}: {result.tensors} tensors, {size(result.bytes)}, all match {MANIFEST}, in {seconds:.1f} s")
        say("no damage was found; checksums are not a signature, so this does not tell who made the folder")
    return 0
