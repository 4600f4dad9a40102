"""The small kernels of a decoder layer, as a decode step launches them: all latency, 2 to 4 us each.

Attention of a short context rotates its query, caches the new key and value, and merges its pieces; two norms add the
partial sums of the linears before them. SwiGLU has a launch of its own only where up | gate has partial sums. With
programmatic dependent launch, where the GPU has it, and without.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cases import BLOCK, Maker
from benchmarks.gpu.place import Place
from qvl_kernels.util import dtype_name

Row = dict[str, Any]
Calls = dict[str, Callable[[], object]]
ROWS = (1, 16)
LAYERS = 8  # in a row
HEADS, HEAD_DIM, HIDDEN, GATED = 32, 128, 4096, 11008
CONTEXT = 4 * BLOCK  # tokens: the least time that attention takes
DEPENDENT = "QVL_DEPENDENT_LAUNCH"


def small_kernels(place: Place) -> Iterator[Row]:
    """A row for each kernel alone and one for those of a layer in a row; inputs are partial sums as linears give."""
    layers = 1 if place.tiny else LAYERS
    for rows in ROWS[: 1 if place.tiny else None]:
        for overlapping in (False,) if place.tiny else (True, False):
            with environment(DEPENDENT, "1" if overlapping else "0"):
                calls, alone = layer(place, place.dtypes[0], rows)
                at: Row = {"dtype": dtype_name(place.dtypes[0]), "rows": rows, "dependent": overlapping}
                for name, call in (calls | alone).items():
                    yield {"kernel": name, **at, "us": 1e6 * place.seconds(*[call] * layers)}
                together = place.seconds(*[*calls.values()] * layers) * len(calls)
                yield {"kernel": "all of a layer in a row", **at, "us": 1e6 * together}


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Set a variable of the environment inside the block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def layer(place: Place, dtype: torch.dtype, rows: int) -> tuple[Calls, Calls]:
    """The launches besides linears in a layer of `rows` requests, in order; and the second half of one, alone."""
    from qvl_kernels.triton.launch import capability
    from qvl_kernels.triton.linear.published_shapes import decode_splits

    heads, dim, hidden, wide = (2, 32, 64, 96) if place.tiny else (HEADS, HEAD_DIM, HIDDEN, GATED)
    make, ops, here = Maker(place.device, dtype), place.ops, capability(place.device)

    def sums(name: str, width: int) -> Tensor:
        splits = decode_splits(here, name)
        return make.uniform(splits, rows, width) if splits > 1 else make.normal(rows, width)

    x, weight = make.normal(rows, hidden), make.normal(hidden)
    qkv, up_gate, out, down = (
        sums(name, width)
        for name, width in (("qkv", 3 * heads * dim), ("up_gate", 2 * wide), ("out", hidden), ("down", hidden))
    )
    step = make.new_tokens(CONTEXT, rows, heads, dim).inputs[1:]
    attend: Callable[..., Tensor] = partial(ops.rotary_attention, qkv)
    calls: Calls = {
        "attention, merge": lambda: attend(*step, dtype),
        "norm after out": lambda: ops.add_rms_norm(x, out, weight, 1e-6),
        "swiglu": lambda: ops.swiglu(up_gate, dtype),
        "norm after down": lambda: ops.add_rms_norm(x, down, weight, 1e-6),
    }
    if decode_splits(here, "up_gate") == 1:
        del calls["swiglu"]  # the linear's kernel takes it
    return calls, {"merge": merge_of(make.uniform(rows, heads, CONTEXT // BLOCK // 2, dim), dtype, here)}


def merge_of(partial: Tensor, dtype: torch.dtype, here: int) -> Callable[[], None]:
    """The launch that merges partial results [rows, heads, pieces, dim] of CONTEXT keys."""
    from qvl_kernels.triton.attention.decode import unit_of
    from qvl_kernels.triton.attention.merge import merge
    from qvl_kernels.triton.dependent import dependent

    rows, heads, _, dim = partial.shape
    lengths = torch.full((rows,), CONTEXT, device=partial.device)
    lse, out = partial[..., 0].contiguous(), torch.empty(rows, heads, dim, dtype=dtype, device=partial.device)
    unit = unit_of(BLOCK, int8=False)
    return merge(partial, lse, lengths, lengths, out, 0, unit, listed=False, pdl=dependent(here, rows)).run
