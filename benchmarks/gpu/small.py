"""The small kernels of a decoder layer in a row, as a decode step launches them: all latency, 2 to 4 us each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cases import BLOCK, Maker
from benchmarks.gpu.place import Place
from qvl_kernels.util import cdiv, dtype_name

Row = dict[str, Any]
ROWS = (1, 16)
LAYERS = 8  # in a row
HEADS, HEAD_DIM, HIDDEN, GATED = 32, 128, 4096, 11008


def small_kernels(place: Place) -> Iterator[Row]:
    """A row for each kernel alone and one for those of a layer in a row; inputs are partial sums as linears give."""
    for dtype in place.dtypes[:1]:
        for rows in ROWS[: 1 if place.tiny else None]:
            calls = layer(place, dtype, rows)
            for name, call in calls.items():
                taken = place.seconds(*[call] * (1 if place.tiny else LAYERS))
                yield {"kernel": name, "dtype": dtype_name(dtype), "rows": rows, "us": taken * 1e6}
            together = place.seconds(*[*calls.values()] * (1 if place.tiny else LAYERS)) * len(calls)
            yield {"kernel": "all in a row", "dtype": dtype_name(dtype), "rows": rows, "us": together * 1e6}


def layer(place: Place, dtype: torch.dtype, rows: int) -> dict[str, Callable[[], object]]:
    """The norms, the rotary embedding and SwiGLU of a layer of `rows` tokens, by name."""
    from qvl_kernels.triton.launch import capability
    from qvl_kernels.triton.linear.published_shapes import decode_splits

    heads, dim, hidden, gated = (2, 32, 64, 96) if place.tiny else (HEADS, HEAD_DIM, HIDDEN, GATED)
    make, ops, here = Maker(place.device, dtype), place.ops, capability(place.device)

    def sums(name: str, width: int) -> Tensor:
        splits = decode_splits(here, name)
        return make.uniform(splits, rows, width) if splits > 1 else make.normal(rows, width)

    x, weight = make.normal(rows, hidden), make.normal(hidden)
    cos, sin, logn = make.uniform(rows, dim), make.uniform(rows, dim), make.uniform(rows)
    k, v = (torch.zeros(cdiv(rows, BLOCK) + 1, heads, BLOCK, dim, dtype=dtype, device=place.device) for _ in "kv")
    slots = torch.arange(rows, device=place.device)
    qkv, up_gate, out, down = (
        sums(name, width)
        for name, width in (("qkv", 3 * heads * dim), ("up_gate", 2 * gated), ("out", hidden), ("down", hidden))
    )
    return {
        "rotary to cache": lambda: ops.rotary_to_cache(qkv, cos, sin, logn, k, v, slots, dtype),
        "norm after out": lambda: ops.add_rms_norm(x, out, weight, 1e-6),
        "swiglu": lambda: ops.swiglu(up_gate, dtype),
        "norm after down": lambda: ops.add_rms_norm(x, down, weight, 1e-6),
    }
