"""A function's kernel calls recorded while it runs, and run again by one call of C, with no Python between them.

What is recorded are addresses. Tensors that the function is given must stay where they are, which is the caller's part;
those that it makes lie in an arena, where one that is let go leaves its place to the next, as in any allocator.
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
MAKES = {"aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided"}


class Arena:
    """Memory for the tensors of functions that never run at the same time; what one left is used by the next."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._places: dict[int, NDArray[np.uint8]] = {}  # by address
        self._free: list[NDArray[np.uint8]] = []

    def like(self, x: Tensor) -> Tensor:
        """An uninitialized tensor of the shape and dtype of x, which is contiguous; its place is free when it goes."""
        place = self._take(x.nbytes)
        lease = place[: x.nbytes]
        weakref.finalize(lease, self._free.append, place).atexit = False
        return torch.frombuffer(lease, dtype=x.dtype).view(x.shape)

    def window(self, x: Tensor) -> Tensor:
        """The same memory as x, of which others may make use when x has gone; x itself where it is not of the arena."""
        place = self._places.get(x.data_ptr())
        return x if place is None else torch.frombuffer(place[: x.nbytes], dtype=x.dtype).view(x.shape)

    def _take(self, nbytes: int) -> NDArray[np.uint8]:
        """The smallest free place that is large enough. Sizes are powers of two, so that places fit others too."""
        fitting = [i for i, place in enumerate(self._free) if len(place) >= nbytes]
        if fitting:
            return self._free.pop(min(fitting, key=lambda i: len(self._free[i])))
        size = max(LINE, 1 << (nbytes - 1).bit_length())
        raw = np.empty(size + LINE, np.uint8)
        start = -raw.ctypes.data % LINE
        place = raw[start : start + size]
        self._places[place.ctypes.data] = place
        self.nbytes += size
        return place


class _Argument(ctypes.Union):
    _fields_ = (("pointer", ctypes.c_void_p), ("integer", ctypes.c_int64), ("number", ctypes.c_double))


class _Call(ctypes.Structure):
    _fields_ = (("kernel", ctypes.c_void_p), ("arguments", ctypes.POINTER(_Argument)))


class Recording:
    """What a function of no arguments did, as calls of kernels.

    `fallback_reason` says why it cannot be replayed: something other than a kernel computed. None otherwise.
    """

    def __init__(self, function: Callable[[], Tensor]) -> None:
        self.library = library()
        self._function = function  # which keeps alive what it was given: weights, caches, static buffers
        self.fallback_reason: str | None = None
        self._calls: list[_Call] = []
        self._list: ctypes.Array[_Call]
        self._output: Tensor

    @classmethod
    def of(cls, function: Callable[[], Tensor], arena: Arena) -> tuple[Recording, Tensor]:
        """Run a function, a run like any other, and record it; also gives the result."""
        recording = cls(function)
        with recording.library.recording(recording._kernels()), _Watch(recording, arena):
            output = function()
        recording._list = (_Call * len(recording._calls))(*recording._calls)
        recording._output = arena.window(output)
        return recording, output

    def replay(self) -> Tensor:
        """The result, computed anew where the last one was, on as many threads as torch may use now.

        It holds until the next replay or recording in the same arena.
        """
        self.library.ready()
        self.library.replay(self._list, len(self._calls))
        return self._output

    def __len__(self) -> int:
        """How many calls it holds."""
        return len(self._calls)

    def fall_back(self, reason: str) -> None:
        self.fallback_reason = self.fallback_reason or reason

    def _kernels(self) -> SimpleNamespace:
        return SimpleNamespace(**{name: self._recorded(name) for name in SIGNATURES})

    def _recorded(self, name: str) -> Callable[..., None]:
        kernel, entry, letters = getattr(self.library.kernels, name), self.library.entry(name), SIGNATURES[name]
        fields = [{"P": "pointer", "i": "integer", "d": "number"}[letter] for letter in letters]

        def call(*given: Any) -> None:
            kernel(*given)
            arguments = (_Argument * len(fields))()
            for argument, field, value in zip(arguments, fields, given, strict=True):
                if isinstance(value, ctypes.Array):
                    self.fall_back(f"{name} is given numbers of the host, which would stay as they are")
                    return
                setattr(argument, field, value)
            self._calls.append(_Call(entry, arguments))

        return call


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Puts tensors that are made into the arena, and refuses ops of torch that compute."""

    def __init__(self, recording: Recording, arena: Arena) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recording, self._arena = recording, arena

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: else torch imports its compiler to skip this, 146 MiB and 1.7 s at the first token."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in MAKES and result.is_contiguous() and result.nbytes:
            return self._arena.like(result)
        if name not in MAKES and not _only_looks(func, result, args):
            self._recording.fall_back(f"{name.removeprefix('aten::')} runs in torch")
        return result


def _only_looks(func: Any, result: Any, args: Any) -> bool:
    """Whether an op gave nothing but a view of a tensor that it was given."""
    if func._schema.is_mutable:
        return False
    given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
    made = result if isinstance(result, (tuple, list)) else [result]
    return all(isinstance(x, Tensor) and x.untyped_storage().data_ptr() in given for x in made)
