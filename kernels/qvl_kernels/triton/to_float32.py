"""16-bit floats to float32, as cheaply as the machine can."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_float32(x):
    """x as float32. Of bfloat16 the bits are moved: asked for a conversion, the compiler takes two steps for half."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)
