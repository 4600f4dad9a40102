"""Gluon, the part of Triton in which a kernel names its layouts; in Triton's interpreter, its functions without them.

A kernel in Gluon compiles to the same loop on every Triton that is supported, because no pass of the compiler chooses a
layout: plain Triton sends a weight that was unpacked in registers through shared memory on some versions and not on
others. The interpreter knows nothing of Gluon, so `interpreted_gluon` computes the same on plain tensors.
"""

from __future__ import annotations

from qvl_kernels.triton.launch import interpreted

if interpreted():
    from qvl_kernels.triton.interpreted_gluon import gl, gluon, mma
else:
    from triton.experimental import gluon  # type: ignore[no-redef]
    from triton.experimental.gluon import language as gl  # type: ignore[no-redef]
    from triton.experimental.gluon.language.nvidia.ampere import mma_v2 as mma  # type: ignore[no-redef]

__all__ = ["gl", "gluon", "mma"]
