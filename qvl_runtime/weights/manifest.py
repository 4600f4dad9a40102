"""The manifest of a converted checkpoint: its source, its layout, and the SHA-256 of each part.

It may come from a stranger, so all that it says is checked when it is read, before a path is made of a name in it. The
SHA-256 in it is no signature: one who changes a file can change the manifest too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qvl_runtime.config.checks import read_json, require_choice
from qvl_runtime.config.model import DTYPES
from qvl_runtime.errors import MAX_MESSAGE, CheckpointError, ConfigError, escaped, quoted, shortened
from qvl_runtime.reading.regular_files import is_there
from qvl_runtime.weights.file_names import INDEXES, SMALL_FILES, WEIGHTS, check_distinct, check_names
from qvl_runtime.weights.files import sync
from qvl_runtime.weights.records import check_once, read_record

MANIFEST = "qvl_manifest.json"
TARGETS = ("cpu", "cuda")
KEEP = "keep"
FORMAT = 1  # increased when an older reader would misread a newer file
MAX_NOTES = 20
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One weight file of the checkpoint that was converted."""

    bytes: int
    sha256: str  # of the whole file, as hubs publish it
    header: str  # of the safetensors file with its tensors: its own, or that of the file that a .bin is restored as
    restored_as: str  # file name after restoring
    exact: bool  # restored byte for byte; otherwise only its tensors are equal


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A linear in the layout of its target's kernels; its tensors are named `{name}.{target}.{tensor}`."""

    layout: str
    tensors: list[str]
    fields: dict[str, int]
    parts: list[str]  # the published linears merged in it, along the outputs
    rounded: bool  # from floats: the published weight cannot be restored


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """One file of the converted checkpoint."""

    front: str  # SHA-256 of everything before the tensors
    tensors: dict[str, str]  # SHA-256 of each


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of `qvl_manifest.json`."""

    target: str
    dtype: str
    vision: str
    head: str
    sources: dict[str, SourceFile]
    indexes: dict[str, str]  # the source's index files
    companions: dict[str, str]  # SHA-256 of the configuration and tokenizer files
    state: list[str]  # dense tensors that the model loads
    cast: bool  # floats of another dtype were rounded to `dtype`
    linears: dict[str, PackedLinear] = field(default_factory=dict)
    shards: dict[str, ShardRecord] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # where the source was read otherwise than it is labeled

    @property
    def rounded(self) -> list[str]:
        """Names of weights that differ from the published ones."""
        names = [name for name, linear in self.linears.items() if linear.rounded]
        return [*names, *(["weights of another dtype"] if self.cast else [])]

    def write(self, folder: Path) -> None:
        """Write the manifest with its own digest, to the disk. Raises `CheckpointError` as `read` would."""
        _check(self, MANIFEST)
        content = {"format": FORMAT, **asdict(self)}
        if not self.notes:  # a reader of earlier versions does not know the key
            del content["notes"]
        content["sha256"] = _digest(content)
        path = folder / MANIFEST
        with path.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        sync(folder)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a folder's manifest and check all that is in it.

        Raises `CheckpointError` for one that is missing, damaged or of another version.
        """
        path = folder / MANIFEST
        if not is_there(path):
            raise CheckpointError(f"{folder} is not a converted checkpoint, as it has no {MANIFEST}: run qvl convert")
        content = read_json(path, CheckpointError)
        version = content.pop("format", None)
        if version != FORMAT:
            raise CheckpointError(f"{path} has format {quoted(version)}; expected {FORMAT}: convert the source again")
        if content.pop("sha256", None) != _digest({"format": FORMAT, **content}):
            raise CheckpointError(f"{path} was changed after it was written: convert the source again")
        manifest = read_record(cls, content, str(path), _RECORDS)
        _check(manifest, str(path))
        notes = [shortened(escaped(note), MAX_MESSAGE) for note in manifest.notes[:MAX_NOTES]]
        return replace(manifest, notes=notes)


_RECORDS = {record.__name__: record for record in (SourceFile, PackedLinear, ShardRecord)}


def _check(manifest: Manifest, where: str) -> None:
    """Raise `CheckpointError` for a name that is not one of a file of its kind, and for values that do not exist."""
    try:
        require_choice("target", manifest.target, TARGETS)
        require_choice("dtype", manifest.dtype, DTYPES)
        require_choice("vision", manifest.vision, (KEEP, "int8"))
        require_choice("head", manifest.head, (KEEP, "int8", "int4"))
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
    _check_files(manifest, where)
    digests = [file.sha256 for file in manifest.sources.values()]
    digests += [*manifest.companions.values(), *(record.front for record in manifest.shards.values())]
    digests += [digest for record in manifest.shards.values() for digest in record.tensors.values()]
    if wrong := [digest for digest in digests if not _SHA256.fullmatch(digest)]:
        raise CheckpointError(f"{where} has {quoted(wrong[0])} for a SHA-256: convert the source again")
    check_once((name for record in manifest.shards.values() for name in record.tensors), "tensor", where)
    check_once((part for linear in manifest.linears.values() for part in linear.parts), "linear", where)
    check_once(manifest.state, "dense tensor", where)
    for name, linear in manifest.linears.items():
        check_once(linear.tensors, f"tensor of {quoted(name)}", where)


def _check_files(manifest: Manifest, where: str) -> None:
    restored = [file.restored_as for file in manifest.sources.values()]
    check_names((*manifest.sources, *restored), WEIGHTS, f"{where}, sources,")
    check_names(manifest.indexes, INDEXES, f"{where}, indexes,")
    check_names(manifest.companions, SMALL_FILES, f"{where}, companions,")
    check_names(manifest.shards, WEIGHTS[:1], f"{where}, shards,")
    for name in manifest.companions:
        if name.endswith(INDEXES[0][1:]):
            raise CheckpointError(f"{where} has {quoted(name)} among its companions: convert the source again")
    check_distinct((*manifest.companions, *manifest.shards, MANIFEST), where)
    check_distinct((*manifest.companions, *manifest.indexes, *restored, MANIFEST), where)


def is_converted(folder: Path) -> bool:
    """Whether a folder holds a converted checkpoint."""
    return is_there(folder / MANIFEST)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read 16 MiB at a time."""
    digest, buffer = hashlib.sha256(), bytearray(16 << 20)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()
