"""Memory of several NUMA nodes: weights that threads of all of them read are spread over all of them.

The thread pool hands out chunks to whichever thread is free, so no thread is the only reader of a weight, and a
placement by the first one that writes (the thread that packs) would have one node's memory serve all cores.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import lru_cache
from pathlib import Path

from qvl_kernels.affinity import allowed_cpus

NODES = Path("/sys/devices/system/node")
MPOL_DEFAULT, MPOL_INTERLEAVE = 0, 3  # of mbind(2)
_SYSCALLS = {"x86_64": (237, 239), "aarch64": (235, 236)}  # mbind and get_mempolicy, which glibc does not wrap
_MASK_BITS = 1024  # nodes that a mask names, the most that Linux supports


def cpu_list(text: str) -> set[int]:
    """Parse Linux's lists of CPUs or nodes: "0-3,8" is {0, 1, 2, 3, 8}."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            found.update(range(int(first), int(last or first) + 1))
    return found


def nodes_of(cpus: set[int], folder: Path = NODES) -> list[int]:
    """Return the nodes with memory that some of the CPUs belong to; none if the OS does not report nodes."""
    try:
        with_memory = cpu_list((folder / "has_memory").read_text())
        return [n for n in sorted(with_memory) if cpu_list((folder / f"node{n}" / "cpulist").read_text()) & cpus]
    except (OSError, ValueError):
        return []


@lru_cache(maxsize=1)
def nodes_in_use() -> tuple[int, ...]:
    """The nodes whose CPUs this process may use; fixed when first called."""
    if not sys.platform.startswith("linux"):
        return ()
    return tuple(nodes_of(allowed_cpus()))


def spread(address: int, nbytes: int, nodes: tuple[int, ...] | None = None) -> bool:
    """Spread pages that are not resident yet evenly over `nodes`, by default those in use; return whether it was done.

    It is not where there is one node only, where the process has a policy of its own (`numactl`), and where the system
    does not allow it. `address` is that of a page.
    """
    nodes = nodes_in_use() if nodes is None else nodes
    numbers = _SYSCALLS.get(platform.machine())
    if len(nodes) < 2 or numbers is None or not sys.platform.startswith("linux"):
        return False
    call, (mbind, get_mempolicy) = ctypes.CDLL(None, use_errno=True).syscall, numbers
    call.restype = ctypes.c_long
    policy = ctypes.c_int(-1)
    if call(get_mempolicy, ctypes.byref(policy), None, 0, None, 0) != 0 or policy.value != MPOL_DEFAULT:
        return False
    mask = (ctypes.c_ulong * (_MASK_BITS // (8 * ctypes.sizeof(ctypes.c_ulong))))()
    for node in nodes:
        mask[node // (8 * ctypes.sizeof(ctypes.c_ulong))] |= 1 << node % (8 * ctypes.sizeof(ctypes.c_ulong))
    arguments = (
        ctypes.c_void_p(address),
        ctypes.c_size_t(nbytes),
        MPOL_INTERLEAVE,
        mask,
        ctypes.c_ulong(_MASK_BITS),
        0,
    )
    return bool(call(mbind, *arguments) == 0)
