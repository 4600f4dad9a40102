"""Memory is spread over the NUMA nodes whose CPUs are in use: of a made /sys tree, and by the system call."""

from __future__ import annotations

import ctypes
import mmap
import platform
import sys
from pathlib import Path

import pytest

from qvl_kernels.numa import _SYSCALLS, MPOL_DEFAULT, MPOL_INTERLEAVE, NODES, cpu_list, nodes_in_use, nodes_of, spread

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0-3,8\n", {0, 1, 2, 3, 8}), ("", set()), ("\n", set()), ("5", {5}), ("0,64", {0, 64})],
)
def test_lists_of_cpus(text: str, expected: set[int]) -> None:
    assert cpu_list(text) == expected


def test_nodes_with_memory_and_cpus_in_use(tmp_path: Path) -> None:
    """Node 2 has no memory, node 3 (memory of an accelerator) no CPUs."""
    (tmp_path / "has_memory").write_text("0-1,3\n")
    for node, cpus in enumerate(("0-3", "4-7", "8-11", "")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(cpus + "\n")
    assert nodes_of(set(range(12)), tmp_path) == [0, 1]
    assert nodes_of({5, 9}, tmp_path) == [1]
    assert nodes_of({1}, tmp_path / "elsewhere") == []


def test_memory_of_one_node_is_left_alone() -> None:
    assert not spread(0, 1 << 21, (0,)) and not spread(0, 1 << 21, ())


def policy_of(address: int | None) -> tuple[int, set[int]]:
    """The policy and the nodes of the memory at an address, or of the thread, as the system has them."""
    policy, mask = ctypes.c_int(-1), (ctypes.c_uint64 * 16)()
    by_address = 0 if address is None else 2  # MPOL_F_ADDR
    where, bits = ctypes.c_void_p(address), ctypes.c_ulong(1024)
    number = _SYSCALLS[platform.machine()][1]
    call = ctypes.CDLL(None, use_errno=True).syscall
    assert call(number, ctypes.byref(policy), mask, bits, where, by_address) == 0, ctypes.get_errno()
    return policy.value, {n for n in range(1024) if mask[n // 64] >> n % 64 & 1}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux has these system calls")
def test_the_system_spreads_a_mapping() -> None:
    """A node that does not exist is ignored next to one that does; a container may forbid the call."""
    memory = mmap.mmap(-1, 1 << 21)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    node = (nodes_in_use() or (0,))[0]
    if not spread(address, 1 << 21, (node, node + 1)):
        pytest.skip("the system does not allow mbind here")
    memory[:] = b"1" * (1 << 21)
    assert memory[-1:] == b"1"
    there = cpu_list((NODES / "has_memory").read_text()) if NODES.is_dir() else {node}
    assert policy_of(address) == (MPOL_INTERLEAVE, {node, node + 1} & there)
    assert policy_of(None) == (MPOL_DEFAULT, set())  # other memory of this thread
