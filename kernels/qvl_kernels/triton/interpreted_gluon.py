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


# The interpreter replaces the functions of `tl` while a kernel runs, so each is looked up when it is called.
gl = SimpleNamespace(
    float16=tl.float16,
    bfloat16=tl.bfloat16,
    float32=tl.float32,
    int16=tl.int16,
    int32=tl.int32,
    int64=tl.int64,
    DistributedLinearLayout=_no_layout,
    DotOperandLayout=_no_layout,
    NVMMADistributedLayout=_no_layout,
    SliceLayout=_no_layout,
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
