"""Check a packed linear of any layout before its kernel is known."""

from __future__ import annotations

from qvl_kernels.packed_checks import check_published
from qvl_kernels.reference import Packed


def checked_shape(packed: Packed) -> tuple[int, int]:
    """The outputs and inputs of a packed linear whose parts fit one another. Raises `ValueError` for any other."""
    if packed.layout == "gptq":
        return check_published(packed.tensors, packed.fields)
    from qvl_kernels.cpu import linears as cpu
    from qvl_kernels.layouts.gpu import kind_of

    weight = (
        cpu.PackedWeight.from_packed(packed) if packed.layout == cpu.LAYOUT else kind_of(packed).from_packed(packed)
    )
    return weight.outputs, weight.inputs


def packed_bits(packed: Packed) -> int:
    """The bits of a code of a packed linear."""
    from qvl_kernels.layouts.gpu import KINDS

    bits = {kind.LAYOUT: bits for bits, kind in KINDS.items()}
    return bits.get(packed.layout) or packed.fields["bits"]
