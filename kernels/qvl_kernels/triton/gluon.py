"""Gluon, the part of Triton in which a kernel names its layouts; in Triton's interpreter, its functions without them.

A kernel in Gluon compiles to the same loop on every Triton that is supported, because no pass of the compiler chooses a
layout: plain Triton sends a weight that was unpacked in registers through shared memory on some versions and not on
others. The interpreter knows nothing of Gluon, so `interpreted_gluon` computes the same on plain tensors.
"""

from __future__ import annotations

from qvl_kernels.triton.launch import interpreted

if interpreted():
    from qvl_kernels.triton.interpreted_gluon import (
        async_load,
        commit_group,
        fence_async_shared,
        gl,
        gluon,
        mma,
        wait_group,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
else:
    from triton.experimental import gluon  # type: ignore[no-redef]
    from triton.experimental.gluon import language as gl  # type: ignore[no-redef]
    from triton.experimental.gluon.language.nvidia.ampere import async_copy
    from triton.experimental.gluon.language.nvidia.ampere import mma_v2 as mma  # type: ignore[no-redef]
    from triton.experimental.gluon.language.nvidia.hopper import (  # type: ignore[no-redef]
        fence_async_shared,
        warpgroup_mma,
        warpgroup_mma_wait,
    )

    # renamed in Triton 3.8
    async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
    commit_group, wait_group = async_copy.commit_group, async_copy.wait_group

__all__ = [
    "async_load",
    "commit_group",
    "fence_async_shared",
    "gl",
    "gluon",
    "mma",
    "wait_group",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]
