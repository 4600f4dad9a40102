"""The files of a checkpoint that is converted, and how a manifest describes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from qvl_runtime.config.checks import LARGEST_JSON, read_json
from qvl_runtime.errors import CheckpointError, quoted
from qvl_runtime.reading.regular_files import read_regular
from qvl_runtime.reading.text import decode
from qvl_runtime.weights.checkpoint import Checkpoint
from qvl_runtime.weights.file_names import SMALL_FILES, check_names
from qvl_runtime.weights.manifest import MANIFEST, SourceFile
from qvl_runtime.weights.tensor_file import CODES, Written, header_of, read_header


def small_files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files of these kinds in order, without a manifest, and without folders and pipes of such names."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.name != MANIFEST)


def check_files(checkpoint: Checkpoint) -> None:
    """Raise `CheckpointError` for what a converted folder cannot hold: odd names of files, and unknown dtypes."""
    where = f"{checkpoint.folder}, which is to be converted,"
    check_names((path.name for path in checkpoint.paths), ("*",), where)
    check_names((path.name for path in small_files(checkpoint.folder, SMALL_FILES)), ("*",), where)
    for name in checkpoint.names:
        if (dtype := checkpoint.info(name).dtype) not in CODES:
            raise CheckpointError(
                f"{checkpoint.folder} has {quoted(name)} of dtype {quoted(dtype)}, which cannot be copied: no model "
                "uses it, so save the weights without it"
            )


def index_text(checkpoint: Checkpoint, path: Path) -> str:
    """An index of the source as it stands, or with the published names where the weights are stored under others."""
    if not checkpoint.renamed:
        data = read_regular(path, CheckpointError, LARGEST_JSON)
        decode(data, str(path), CheckpointError)  # raises for another encoding; the mark that it drops is kept here
        return data.decode()
    files = {name: checkpoint.file(name) for name in checkpoint.names}
    return json.dumps({**read_json(path, CheckpointError), "weight_map": files}, indent=2)


def source_file(checkpoint: Checkpoint, path: Path, sha256: str) -> SourceFile:
    """A weight file of the source, and what it is restored as."""
    if checkpoint.restorable(path.name):
        return SourceFile(path.stat().st_size, sha256, read_header(path).decode(), path.name, True)
    tensors, offset = {}, 0
    for name in (name for name in checkpoint.names if checkpoint.file(name) == path.name):
        info, size = checkpoint.info(name), checkpoint.nbytes(name)
        tensors[name] = Written(CODES[info.dtype], info.shape, offset, offset + size, "")
        offset += size
    restored = f"{path.stem.replace('pytorch_model', 'model')}.safetensors"
    return SourceFile(path.stat().st_size, sha256, header_of(tensors).decode(), restored, False)
