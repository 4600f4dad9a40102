"""Bind a published GPTQ linear: repack it for the kernels, or fall back to the reference ops with a warning."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import Tensor

from qvl_kernels import reference
from qvl_kernels.layouts.repack import zero_points
from qvl_kernels.reference import BoundLinear, Packed, Precision

_log = logging.getLogger("qvl_kernels")


def bind_published(
    packed: Packed,
    precision: Precision,
    pack: Callable[..., Packed],
    bind: Callable[[Packed, Precision], BoundLinear],
    unsupported: Callable[[Tensor, Tensor, Tensor | None, int, Tensor], str | None],
) -> BoundLinear:
    """Repack a linear of layout "gptq" with `pack` and bind it with `bind`.

    If `pack` returns it as published, the kernels cannot hold it: the reference ops run, with a warning that gives the
    reason. `unsupported` returns that reason from qweight, scales, g_idx, bits and the zero points int32 [G, out].
    """
    published = {name: packed.tensors.get(name) for name in ("qweight", "qzeros", "scales", "g_idx", "bias")}
    repacked = pack(**published, **packed.fields)
    if repacked.layout != "gptq":
        return bind(repacked, precision)
    tensors, bits = packed.tensors, packed.fields["bits"]
    zeros = zero_points(tensors["qzeros"], bits, packed.fields["zero_offset"])
    reason = unsupported(tensors["qweight"], tensors["scales"], tensors.get("g_idx"), bits, zeros)
    outputs = tensors["scales"].shape[1]
    _log.warning("a linear of %d outputs runs in plain torch, unpacked on each use: %s", outputs, reason)
    fallback = reference.bind(packed, precision)
    return fallback._replace(kernel=f"{fallback.kernel} ({reason})")
