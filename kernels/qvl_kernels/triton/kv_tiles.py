"""Reading tiles of keys or values from the paged cache, 16-bit or int8."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(cache_ptr, at, keys, columns, dtype: tl.constexpr, D: tl.constexpr, INT8: tl.constexpr):
    """Vectors [N, BLOCK_D] in dtype whose first elements lie at `at` [N]; zeros where not keys [N] or not columns.

    The rounding is that of `reference.from_cached`. An int8 vector has its float32 scale behind its D levels.
    """
    stored = tl.load(cache_ptr + at[:, None] + tl.arange(0, columns.shape[1])[None, :], keys[:, None] & columns, 0)
    if INT8:
        scale = tl.load((cache_ptr + at + D).to(tl.pointer_type(tl.float32), bitcast=True), keys, 0.0)
        return (stored.to(tl.float32) * scale[:, None]).to(dtype)
    return stored.to(dtype)
