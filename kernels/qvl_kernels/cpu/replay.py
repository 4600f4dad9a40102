"""Record the kernel calls of a function and replay them by one call into C, without Python in between.

The recording holds addresses. The caller must keep the function's input tensors in place; the tensors that it allocates
are in an arena, where the memory of a freed tensor is reused by the next one, as in any allocator.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qvl_kernels.cpu.library import SIGNATURES, library

LINE = 64  # bytes
ALLOCATING_OPS = {
    "aten::empty",
    "aten::new_empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty_strided",
}


class Arena:
    """Memory for the tensors of recorded functions that never run at the same time and share it."""

    def __init__(self) -> None:
        """Start empty; `nbytes` is the memory allocated so far."""
        self.nbytes = 0
        self._chunks: dict[int, NDArray[np.uint8]] = {}  # by address
        self._free: list[NDArray[np.uint8]] = []

    def like(self, x: Tensor) -> Tensor:
        """Allocate an uninitialized tensor like x, which is contiguous; its chunk is reused once it is freed."""
        chunk = self._take(x.nbytes)
        lease = chunk[: x.nbytes]
        weakref.finalize(lease, self._free.append, chunk).atexit = False
        return torch.frombuffer(lease, dtype=x.dtype).view(x.shape)

    def window(self, x: Tensor) -> Tensor:
        """Return a view of x's memory that does not keep it allocated; x itself if it is not in the arena."""
        chunk = self._chunks.get(x.data_ptr())
        return x if chunk is None else torch.frombuffer(chunk[: x.nbytes], dtype=x.dtype).view(x.shape)

    def _take(self, nbytes: int) -> NDArray[np.uint8]:
        """Take the smallest free chunk that is large enough. Sizes are powers of two, so that chunks can be reused."""
        fitting = [i for i, chunk in enumerate(self._free) if len(chunk) >= nbytes]
        if fitting:
            return self._free.pop(min(fitting, key=lambda i: len(self._free[i])))
        size = max(LINE, 1 << (nbytes - 1).bit_length())
        raw = np.empty(size + LINE, np.uint8)
        start = -raw.ctypes.data % LINE
        chunk = raw[start : start + size]
        self._chunks[chunk.ctypes.data] = chunk
        self.nbytes += size
        return chunk


class _Argument(ctypes.Union):
    _fields_ = (("pointer", ctypes.c_void_p), ("integer", ctypes.c_int64), ("number", ctypes.c_double))


class _Call(ctypes.Structure):
    _fields_ = (("kernel", ctypes.c_void_p), ("arguments", ctypes.POINTER(_Argument)))


class Recording:
    """The kernel calls of a function without arguments.

    `fallback_reason` says why they cannot be replayed: something other than a kernel computed. None otherwise.
    """

    def __init__(self, function: Callable[[], Tensor]) -> None:
        """Start empty, for a function; `of` runs and records it."""
        self.library = library()
        self._function = function  # keeps its inputs alive: weights, caches, static buffers
        self.fallback_reason: str | None = None
        self._calls: list[_Call] = []
        self._list: ctypes.Array[_Call]
        self._output: Tensor

    @classmethod
    def of(cls, function: Callable[[], Tensor], arena: Arena) -> tuple[Recording, Tensor]:
        """Run a function normally while recording it; returns the recording and the result."""
        recording = cls(function)
        with recording.library.recording(recording._kernels()), _Watch(recording, arena):
            output = function()
        recording._list = (_Call * len(recording._calls))(*recording._calls)
        recording._output = arena.window(output)
        return recording, output

    def replay(self) -> Tensor:
        """Compute the result again, in the memory of the previous one, on torch's current number of threads.

        It is valid until the next replay or recording in the same arena.
        """
        self.library.ready()
        self.library.replay(self._list, len(self._calls))
        return self._output

    def __len__(self) -> int:
        """Return the number of recorded calls."""
        return len(self._calls)

    def fall_back(self, reason: str) -> None:
        """Mark the recording as one that cannot be replayed; the first reason is kept."""
        self.fallback_reason = self.fallback_reason or reason

    def _kernels(self) -> SimpleNamespace:
        return SimpleNamespace(**{name: self._recorded(name) for name in SIGNATURES})

    def _recorded(self, name: str) -> Callable[..., None]:
        kernel, entry, letters = getattr(self.library.kernels, name), self.library.entry(name), SIGNATURES[name]
        fields = [{"P": "pointer", "i": "integer", "d": "number"}[letter] for letter in letters]

        def call(*values: Any) -> None:
            kernel(*values)
            arguments = (_Argument * len(fields))()
            for argument, field, value in zip(arguments, fields, values, strict=True):
                if isinstance(value, ctypes.Array):
                    self.fall_back(f"{name} is passed numbers on the host, which a replay could not update")
                    return
                setattr(argument, field, value)
            self._calls.append(_Call(entry, arguments))

        return call


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Moves new tensors to the arena, and rejects torch ops that compute."""

    def __init__(self, recording: Recording, arena: Arena) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recording, self._arena = recording, arena

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: otherwise torch imports its compiler to skip this, 146 MiB and 1.7 s at the first token."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in ALLOCATING_OPS and result.is_contiguous() and result.nbytes:
            return self._arena.like(result)
        if name not in ALLOCATING_OPS and not _only_views(func, result, args):
            self._recording.fall_back(f"{name.removeprefix('aten::')} runs in torch")
        return result


def _only_views(func: Any, result: Any, args: Any) -> bool:
    """Whether an op returned nothing but views of its arguments."""
    if func._schema.is_mutable:
        return False
    storages = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
    results = result if isinstance(result, (tuple, list)) else [result]
    return all(isinstance(x, Tensor) and x.untyped_storage().data_ptr() in storages for x in results)
