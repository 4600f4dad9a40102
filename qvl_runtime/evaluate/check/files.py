"""The files of a checkpoint: hashes, and the names, shapes and dtypes of its tensors against its configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qvl_runtime.evaluate.checkpoint import checkpoint_hash
from qvl_runtime.weights.checkpoint import Checkpoint
from qvl_runtime.weights.loader import model_config
from qvl_runtime.weights.manifest import MANIFEST


@dataclass(frozen=True, slots=True)
class FilesReport:
    """What is in a checkpoint's folder."""

    whole: str  # SHA-256 of the list of the files' hashes
    files: dict[str, tuple[int, str]]  # bytes and SHA-256 by name
    tensors: dict[str, int]  # how many there are of each dtype; empty for a converted folder


def check_files(folder: Path, progress: Callable[[int, int], None] | None = None) -> FilesReport:
    """Read all files once and compare the tensors with what the configuration requires.

    Raises `CheckpointError` that names what is missing or has another shape.
    """
    found = checkpoint_hash(folder, progress)
    files = {name: ((folder / name).stat().st_size, digest) for name, digest in found.files.items()}
    dtypes: Counter[str] = Counter()
    if not (folder / MANIFEST).exists():  # `qvl verify` compares a converted folder with its manifest
        checkpoint = Checkpoint.open(folder)
        checkpoint.check(model_config(folder))
        dtypes.update(checkpoint.info(name).dtype for name in checkpoint)
    return FilesReport(found.whole, files, dict(dtypes))
