"""What a converted checkpoint says of itself: where it comes from, how it is laid out, and the SHA-256 of each part."""

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
from qvl_runtime.weights.files import sync

MANIFEST = "qvl_manifest.json"
FORMAT = 1  # raised when an older reader would misread a newer file
KEEP = "keep"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One weight file of the checkpoint that was converted."""

    bytes: int
    sha256: str  # of the whole file, as hubs publish it
    header: str  # of the safetensors file that holds its tensors: its own, or of the one that a .bin comes back as
    restored_as: str  # the name that it comes back under
    exact: bool  # it comes back byte for byte; else its tensors do


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A linear in the layout of its target's kernels; its tensors are called `{name}.{target}.{tensor}`."""

    layout: str
    tensors: list[str]
    fields: dict[str, int]
    parts: list[str]  # the published linears that lie side by side in it
    rounded: bool  # from floats: what was published cannot come back


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """One file of the converted checkpoint."""

    front: str  # SHA-256 of all that stands before the tensors
    tensors: dict[str, str]  # SHA-256 of each


@dataclass(frozen=True, slots=True)
class Manifest:
    target: str
    dtype: str
    vision: str
    head: str
    sources: dict[str, SourceFile]
    indexes: dict[str, str]  # the source's index files
    companions: dict[str, str]  # SHA-256 of the configuration and the tokenizer beside the weights
    state: list[str]  # tensors that the model takes as they are
    cast: bool  # floats of another dtype were rounded to `dtype`
    linears: dict[str, PackedLinear] = field(default_factory=dict)
    shards: dict[str, ShardRecord] = field(default_factory=dict)

    @property
    def rounded(self) -> list[str]:
        """What is no longer what was published."""
        names = [name for name, linear in self.linears.items() if linear.rounded]
        return [*names, *(["weights of another dtype"] if self.cast else [])]

    def write(self, folder: Path) -> None:
        content = {"format": FORMAT, **asdict(self)}
        content["sha256"] = _digest(content)
        path = folder / MANIFEST
        with path.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        sync(folder)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises `CheckpointError` where there is none, where it is damaged, and for another version's."""
        path = folder / MANIFEST
        if not path.is_file():
            raise CheckpointError(f"{folder} is no converted checkpoint: it has no {MANIFEST}; make one: qvl convert")
        content = read_json(path, CheckpointError)
        found = content.pop("format", None)
        if found != FORMAT:
            raise CheckpointError(f"{path} has format {found!r}; this version reads {FORMAT}: convert the source anew")
        if content.pop("sha256", None) != _digest({"format": FORMAT, **content}):
            raise CheckpointError(f"{path} is not as it was written: convert the source anew")
        for name, kind in (("sources", SourceFile), ("linears", PackedLinear), ("shards", ShardRecord)):
            content[name] = {key: kind(**value) for key, value in content[name].items()}
        return cls(**content)


def is_converted(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, 16 MiB at a time."""
    digest, buffer = hashlib.sha256(), bytearray(16 << 20)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()
