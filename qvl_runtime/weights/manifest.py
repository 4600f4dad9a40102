"""The manifest of a converted checkpoint: its source, its layout, and the SHA-256 of each part."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qvl_runtime.config.checks import read_json
from qvl_runtime.errors import CheckpointError
from qvl_runtime.regular_files import is_there
from qvl_runtime.weights.files import sync

MANIFEST = "qvl_manifest.json"
FORMAT = 1  # increased when an older reader would misread a newer file
KEEP = "keep"


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
        """Write the manifest with its own digest, to the disk."""
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
        """Read a folder's manifest. Raises `CheckpointError` for one that is missing, damaged or of another version."""
        path = folder / MANIFEST
        if not is_there(path):
            raise CheckpointError(f"{folder} is not a converted checkpoint, as it has no {MANIFEST}: run qvl convert")
        content = read_json(path, CheckpointError)
        version = content.pop("format", None)
        if version != FORMAT:
            raise CheckpointError(f"{path} has format {version!r}; expected {FORMAT}: convert the source again")
        if content.pop("sha256", None) != _digest({"format": FORMAT, **content}):
            raise CheckpointError(f"{path} was changed after it was written: convert the source again")
        for name, kind in (("sources", SourceFile), ("linears", PackedLinear), ("shards", ShardRecord)):
            content[name] = {key: kind(**value) for key, value in content[name].items()}
        return cls(**content)


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
