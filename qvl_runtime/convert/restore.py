"""Restore the published checkpoint from a converted one: the same files, byte for byte, checked by their SHA-256."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qvl_kernels.ops import Packer
from qvl_runtime.errors import CheckpointError
from qvl_runtime.formats.host_memory import pieces, release
from qvl_runtime.weights.loader import open_shards, packed_linear
from qvl_runtime.weights.manifest import Manifest, SourceFile
from qvl_runtime.weights.partial import check_destination, write_folder
from qvl_runtime.weights.shards import Shard
from qvl_runtime.weights.tensor_file import CODES, LENGTH, TensorFile, memory

if TYPE_CHECKING:
    from torch import Tensor


class Restored(NamedTuple):
    """The restored weight files."""

    exact: list[str]  # files with the SHA-256 of the source's
    tensors_only: list[str]  # files with the source's tensors, which it had in another format


def restore(source: Path, destination: Path, progress: Callable[[int], None] = lambda done: None) -> Restored:
    """Write the checkpoint that `source` was converted from as the folder `destination`, which appears when complete.

    progress: called with the number of bytes written. Raises `CheckpointError` where the conversion rounded weights,
    for a file that differs from the source's, and for a destination that exists or is being written.
    """
    from qvl_kernels import packing_for

    source, destination = Path(source), Path(destination)
    check_destination(source, destination)
    manifest = Manifest.read(source)
    if manifest.rounded:
        raise CheckpointError(
            f"{source} holds {len(manifest.rounded)} weights that were rounded ({', '.join(manifest.rounded[:3])}), so "
            "the published ones cannot be restored: keep the source"
        )

    def write(folder: Path) -> None:
        reader, done = _Reader(source, manifest, packing_for(manifest.target)), 0
        for file in manifest.sources.values():
            done += _write(folder / file.restored_as, file, reader)
            progress(done)
        _small_files(source, folder, manifest)

    write_folder(destination, "qvl convert --to hf", write)
    files = manifest.sources.values()
    return Restored([f.restored_as for f in files if f.exact], [f.restored_as for f in files if not f.exact])


class _Reader:
    """The published tensors of a converted checkpoint."""

    def __init__(self, folder: Path, manifest: Manifest, ops: Packer) -> None:
        shards = open_shards(folder, manifest)
        self._shard_of: dict[str, Shard] = {name: shard for shard in shards.values() for name in shard.infos}
        self._manifest, self._ops = manifest, ops
        self._linears = {part: name for name, linear in manifest.linears.items() for part in linear.parts}
        self._latest: tuple[str, Tensor] | None = None  # a linear that may have another part

    def tensor(self, name: str, dtype: str) -> Iterator[Tensor]:
        """A tensor as `dtype`, in pieces."""
        import torch

        if name in self._shard_of:
            return pieces(self._shard_of[name].tensor(name), getattr(torch, dtype))
        prefix, _, kind = name.rpartition(".")
        if kind != "qweight" or prefix not in self._linears:
            raise CheckpointError(f"the converted checkpoint lacks {name}: convert the source again")
        return iter([self._qweight(prefix)])

    def _qweight(self, part: str) -> Tensor:
        name = self._linears[part]
        linear = self._manifest.linears[name]
        if self._latest is None or self._latest[0] != name:
            packed = packed_linear(name, linear, self._manifest, self._shard_of)
            self._latest = name, self._ops.unpack_to_qweight(packed)
            for tensor in packed.tensors.values():
                release(tensor)
        parts = self._latest[1].chunk(len(linear.parts), dim=1)  # of equal width
        return parts[linear.parts.index(part)].contiguous()


def _write(path: Path, file: SourceFile, reader: _Reader) -> int:
    """Write one published file; returns its size."""
    header, digest = file.header.encode(), hashlib.sha256()
    entries: dict[str, Any] = json.loads(header)
    entries.pop("__metadata__", None)
    dtypes = {code: name for name, code in CODES.items()}
    digest.update(len(header).to_bytes(LENGTH, "little") + header)

    def hashed(parts: Iterator[Tensor]) -> Iterator[Tensor]:
        for part in parts:
            digest.update(memory(part))
            yield part

    with TensorFile(path, LENGTH + len(header)) as out:
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"][0]):
            dtype = dtypes[entry["dtype"]]
            written = out.append(hashed(reader.tensor(name, dtype)), dtype, tuple(entry["shape"]))
            if [written.begin, written.end] != entry["data_offsets"]:
                raise CheckpointError(f"{name} was restored as {written}; the source had it at {entry['data_offsets']}")
        out.finish(header)
    if file.exact and digest.hexdigest() != file.sha256:
        raise CheckpointError(f"{path.name} differs from the source: find the tensor that changed with qvl verify")
    return LENGTH + len(header) + out.size


def _small_files(source: Path, folder: Path, manifest: Manifest) -> None:
    """Copy configuration and tokenizer, and write the index, with new names where the files have new names."""
    for name in manifest.companions:
        shutil.copyfile(source / name, folder / name)
    renamed = {name: file.restored_as for name, file in manifest.sources.items()}
    for name, text in manifest.indexes.items():
        files = set(json.loads(text.removeprefix("\ufeff"))["weight_map"].values())
        if files <= renamed.keys() and any(renamed[file] != file for file in files):
            index = json.loads(text.removeprefix("\ufeff"))
            index["weight_map"] = {tensor: renamed[file] for tensor, file in index["weight_map"].items()}
            name, text = "model.safetensors.index.json", json.dumps(index, indent=2)
        (folder / name).write_bytes(text.encode())
