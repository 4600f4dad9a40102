"""Read what a linear returned: values, or split-K partial sums that are added as they are read."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_sum(x_ptr, at, split_stride, inside, dtype: tl.constexpr, SPLITS: tl.constexpr):
    """Values at `at`, float32; for SPLITS > 0 the sum of partial sums `split_stride` elements from one another, rounded
    to dtype.
    """
    x = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        x += tl.load(x_ptr + split * split_stride + at, inside, 0.0)
    return x.to(dtype).to(tl.float32) if SPLITS > 0 else x
