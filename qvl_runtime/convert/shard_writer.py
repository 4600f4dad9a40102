"""The files of a converted checkpoint, written one after another: each tensor starts on a multiple of 64 bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qvl_kernels.util import dtype_name
from qvl_runtime.weights.manifest import PackedLinear, ShardRecord
from qvl_runtime.weights.tensor_file import TensorFile, Written, header_of

if TYPE_CHECKING:
    from torch import Tensor

ALIGNMENT = 64  # bytes: a cache line, and the widest load of a CPU
SHARD = 1 << 30  # bytes after which a file is closed: a stopped conversion repeats up to one file
HEADER = 1 << 18  # bytes before the first tensor: a multiple of a page
ENTRY = 96  # bytes, rounded up, of a tensor's entry in the header, without its name


class Entry(NamedTuple):
    """A tensor to write."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Iterable[Tensor]  # its elements in order

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Entry:
        """An entry of a whole tensor."""
        return cls(name, dtype_name(tensor.dtype), tuple(tensor.shape), [tensor])

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        import math

        import torch

        return math.prod(self.shape) * int(getattr(torch, self.dtype).itemsize)


class Shard(NamedTuple):
    """A complete file."""

    name: str
    record: ShardRecord
    items: list[str]  # names of the recipes in it
    linears: dict[str, PackedLinear]
    bytes: int


class ShardWriter:
    """Writes files to `folder`, numbered after the finished ones.

    A file may have no gaps. Tensors whose size is not a multiple of 64 bytes are small: they wait in memory and are
    written last, in order of the largest power of two that divides their size, so that each starts on a multiple of its
    element size.
    """

    def __init__(self, folder: Path, shards: dict[str, ShardRecord]) -> None:
        self._folder, self._number = folder, len(shards)
        self.items: list[str] = []
        self._linears: dict[str, PackedLinear] = {}
        self._written: dict[str, Written] = {}
        self._waiting: list[Entry] = []
        self._header_bytes = 0
        self._file: TensorFile | None = None

    def add(self, item: str, entries: Iterable[Entry], linears: dict[str, PackedLinear]) -> None:
        """Write the tensors of an item; `linears` are the packed linears that they form."""
        if self._file is None:
            self._number += 1
            self._file = TensorFile(self._folder / f"qvl-{self._number:05}.safetensors", HEADER)
        for entry in entries:
            self._header_bytes += len(entry.name) + ENTRY
            if entry.nbytes % ALIGNMENT:
                self._waiting.append(entry._replace(parts=[part.clone() for part in entry.parts]))
            else:
                self._written[entry.name] = self._file.append(entry.parts, entry.dtype, entry.shape)
        self.items.append(item)
        self._linears |= linears

    @property
    def full(self) -> bool:
        """Whether this file has reached its size, in bytes or in header entries."""
        return self._file is not None and (self._file.size >= SHARD or self._header_bytes > HEADER // 2)

    def close(self) -> Shard:
        """Finish the file. Raises `ValueError` where nothing was added."""
        if self._file is None:
            raise ValueError("nothing was added")
        self._waiting.sort(key=lambda entry: -(entry.nbytes & -entry.nbytes))
        for entry in self._waiting:
            self._written[entry.name] = self._file.append(entry.parts, entry.dtype, entry.shape)
        with self._file as file:
            front = file.finish(header_of(self._written))
        record = ShardRecord(hashlib.sha256(front).hexdigest(), {n: w.sha256 for n, w in self._written.items()})
        shard = Shard(file.path.name, record, self.items, self._linears, file.size + len(front))
        self.items, self._linears, self._written, self._waiting, self._header_bytes = [], {}, {}, [], 0
        self._file = None
        return shard
