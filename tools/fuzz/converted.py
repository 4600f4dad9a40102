"""Change a converted checkpoint as one who can compute SHA-256 would: its manifest still fits its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from qvl_runtime.weights.manifest import MANIFEST
from qvl_runtime.weights.shards import open_shard
from qvl_runtime.weights.tensor_file import LENGTH, memory, read_header


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest as JSON."""
    return dict(json.loads((folder / MANIFEST).read_text()))


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write a manifest with its own digest."""
    content = {key: value for key, value in content.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps({**content, "sha256": digest}))


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Have `change` change the manifest in place."""
    content = read_manifest(folder)
    change(content)
    write_manifest(folder, content)


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Have `change` change the tensors of every file in place, and enter their new digests."""
    from safetensors.torch import save_file

    content = read_manifest(folder)
    for file in list(content["shards"]):
        shard = open_shard(folder / file)
        tensors = {name: shard.tensor(name).clone() for name in shard.infos}
        del shard
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file)
        header = read_header(folder / file)
        content["shards"][file] = {
            "front": hashlib.sha256(len(header).to_bytes(LENGTH, "little") + header).hexdigest(),
            "tensors": {name: hashlib.sha256(memory(tensor)).hexdigest() for name, tensor in tensors.items()},
        }
    write_manifest(folder, content)
