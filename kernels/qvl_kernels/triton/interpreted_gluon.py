"""What Gluon's functions compute, on the tensors of Triton's interpreter, which have no layouts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import triton
import triton.language as tl

tl.core.dtype.layout = None  # `x.type.layout` of a tensor


def _no_layout(*parameters: Any) -> None:
    return None


def _static_range(*bounds: Any) -> range:
    return range(*(int(getattr(bound, "value", bound)) for bound in bounds))


def mma(a: Any, b: Any, accumulator: Any) -> Any:
    """a b + accumulator, in float32: the interpreter multiplies the bits of bfloat16 as if they were integers."""
    return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator)


class Shared:
    """Buffers in shared memory, [buffers, ..]; what is copied to one is there at once."""

    def __init__(self, dtype: Any, shape: Any, layout: Any) -> None:
        self._parts: dict[int, Any] = {}

    def index(self, at: Any) -> Buffer:
        """One of the buffers."""
        return Buffer(self._parts, int(at.handle.data.item()) if hasattr(at, "handle") else int(at))


class Buffer:
    """A buffer, its transpose, or some columns of one."""

    def __init__(self, parts: dict[int, Any], at: int, turned: bool = False, columns: slice = slice(None)) -> None:
        self._parts, self._at, self._turned, self._columns = parts, at, turned, columns

    def permute(self, order: Any) -> Buffer:
        """The transpose."""
        return Buffer(self._parts, self._at, not self._turned, self._columns)

    def slice(self, start: int, length: int, dim: int) -> Buffer:
        """Columns `start` to `start + length`, all rows."""
        return Buffer(self._parts, self._at, self._turned, slice(start, start + length))

    def load(self, layout: Any) -> Any:
        """What was copied to it last."""
        part = self._parts[self._at]
        numbers = part.handle.data[:, self._columns]
        some = tl.tensor(type(part.handle)(numbers, part.handle.dtype), tl.block_type(part.dtype, [*numbers.shape]))
        return tl.trans(some) if self._turned else some

    def copy(self, value: Any) -> None:
        """Overwrite it."""
        self._parts[self._at] = value


def async_load(to: Buffer, at: Any, inside: Any) -> None:
    """A copy to shared memory: zeros where not `inside`."""
    to.copy(tl.load(at, tl.broadcast_to(tl.core._unwrap_if_constexpr(inside), at.shape), 0))


def commit_group() -> None:
    """Nothing: no copy is under way."""


def wait_group(outstanding: int) -> None:
    """Nothing."""


def fence_async_shared() -> None:
    """Nothing."""


def warpgroup_mma(a: Any, b: Buffer, accumulator: Any, is_async: bool) -> Any:
    """a b + accumulator, in float32."""
    return mma(a, b.load(None), accumulator)


def warpgroup_mma_wait(outstanding: int, values: Any) -> Any:
    """The values."""
    return tuple(values)


# The interpreter replaces the functions of `tl` while a kernel runs, so each is looked up when it is called.
gl = SimpleNamespace(
    float16=tl.float16,
    bfloat16=tl.bfloat16,
    float32=tl.float32,
    int16=tl.int16,
    int32=tl.int32,
    int64=tl.int64,
    BlockedLayout=_no_layout,
    DistributedLinearLayout=_no_layout,
    DotOperandLayout=_no_layout,
    NVMMADistributedLayout=_no_layout,
    NVMMASharedLayout=_no_layout,
    SliceLayout=_no_layout,
    SwizzledSharedLayout=_no_layout,
    allocate_shared_memory=Shared,
    arange=lambda start, end, layout: tl.arange(start, end),
    broadcast=lambda x, like: (tl.broadcast_to(x, like.shape), like),
    convert_layout=lambda x, layout: x,
    exp2=lambda x: tl.exp2(x),
    expand_dims=lambda x, axis: tl.expand_dims(x, axis),
    full=lambda shape, value, dtype, layout: tl.full(shape, value, tl.float32).to(dtype),
    join=lambda a, b: tl.join(a, b),
    load=lambda *arguments, **options: tl.load(*arguments, **options),
    maximum=lambda a, b: tl.maximum(a, b),
    minimum=lambda a, b: tl.minimum(a, b),
    num_programs=lambda axis: tl.num_programs(axis),
    program_id=lambda axis: tl.program_id(axis),
    split=lambda x: tl.split(x),
    static_range=_static_range,
    store=lambda *arguments: tl.store(*arguments),
    sum=lambda x, axis: tl.sum(x, axis),
    zeros=lambda shape, dtype, layout: tl.full(shape, 0, dtype),
)
gluon = SimpleNamespace(jit=triton.jit, constexpr_function=lambda function: _no_layout)
