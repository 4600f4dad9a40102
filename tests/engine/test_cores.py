"""Threads of an engine on a CPU: a core each, within affinity mask and container quota, of a made /sys tree."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from qvl_runtime import cores
from qvl_runtime.config.engine import EngineConfig
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.cores import Cores, settle_threads, usable_cores
from qvl_runtime.engine import loading

pytestmark = pytest.mark.unit


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Two sockets of four cores with two threads each: CPU n and n + 8 are siblings, as Linux numbers them."""
    for cpu in range(16):
        core = cpu % 8
        write(tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology/core_cpus_list", f"{core},{core + 8}")
    for node in (0, 1):
        write(
            tmp_path / f"sys/devices/system/node/node{node}/cpulist",
            f"{4 * node}-{4 * node + 3},{4 * node + 8}-{4 * node + 11}",
        )
    write(tmp_path / "sys/devices/system/node/has_memory", "0-1")
    return tmp_path


def count(machine: Path, affinity: set[int]) -> Cores:
    return usable_cores(machine / "sys", machine / "proc", affinity)


@pytest.mark.parametrize(
    ("affinity", "expected", "threads"),
    [
        (set(range(16)), Cores(16, 8, None, 2), 8),
        ({0, 8}, Cores(2, 1, None, 1), 1),
        ({0, 1, 2, 3}, Cores(4, 4, None, 1), 4),
        ({3, 4, 11}, Cores(3, 2, None, 2), 2),
    ],
)
def test_siblings_are_one_core(machine: Path, affinity: set[int], expected: Cores, threads: int) -> None:
    assert count(machine, affinity) == expected
    assert expected.threads == threads


@pytest.mark.parametrize(
    ("cgroup", "files", "quota", "threads"),
    [
        ("0::/", {"cpu.max": "200000 100000"}, 2.0, 2),
        ("0::/", {"cpu.max": "max 100000"}, None, 8),
        ("0::/", {"cpu.max": "50000 100000"}, 0.5, 1),
        ("0::/", {"cpu.max": "250000 100000"}, 2.5, 3),
        ("0::/pod/box", {"pod/cpu.max": "300000 100000", "pod/box/cpu.max": "max 100000"}, 3.0, 3),
        ("0::/not/visible/here", {"cpu.max": "400000 100000"}, 4.0, 4),
        (
            "4:cpu,cpuacct:/",
            {"cpu,cpuacct/cpu.cfs_quota_us": "150000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            1.5,
            2,
        ),
        ("1:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, None, 8),
        ("0::/", {"cpu.max": "nonsense"}, None, 8),
        ("", {}, None, 8),
    ],
)
def test_the_quota_of_a_container(
    machine: Path, cgroup: str, files: dict[str, str], quota: float | None, threads: int
) -> None:
    write(machine / "proc/self/cgroup", cgroup)
    for name, text in files.items():
        write(machine / "sys/fs/cgroup" / name, text)
    found = count(machine, set(range(16)))
    assert (found.quota, found.threads) == (quota, threads)


def test_a_system_that_tells_nothing_has_a_core_for_each_cpu(tmp_path: Path) -> None:
    assert usable_cores(tmp_path, tmp_path, {0, 1, 2}) == Cores(3, 3, None, 0)


def test_a_core_that_names_no_cpu_is_that_of_its_own_cpu(tmp_path: Path) -> None:
    for cpu in range(3):
        write(tmp_path / f"devices/system/cpu/cpu{cpu}/topology/core_cpus_list", "")
    write(tmp_path / "devices/system/cpu/cpu2/topology/thread_siblings_list", "1-2")
    assert usable_cores(tmp_path, tmp_path, {0, 1, 2}).physical == 3
    write(tmp_path / "devices/system/cpu/cpu1/topology/thread_siblings_list", "1-2")
    assert usable_cores(tmp_path, tmp_path, {0, 1, 2}).physical == 2


def test_this_machine_has_some() -> None:
    here = usable_cores()
    assert 1 <= here.threads <= here.physical <= here.logical


@pytest.mark.parametrize(("before", "chosen", "after"), [(16, None, 4), (5, None, 5), (16, "16", 16), (2, None, 2)])
def test_only_a_default_is_lowered(
    monkeypatch: pytest.MonkeyPatch, before: int, chosen: str | None, after: int
) -> None:
    """5 is a number that torch does not choose itself on such a machine."""
    for name in cores.SET_BY_USER:
        monkeypatch.delenv(name, raising=False)
    if chosen is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    threads = [before]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: threads.__setitem__(0, number))
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    settle_threads(Cores(16, 8, 4.0, 1))
    assert threads == [after]


def test_threads_are_settled_before_ranks_divide_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[str] = []
    monkeypatch.setattr(loading, "settle_threads", lambda: calls.append("settle"))
    monkeypatch.setattr(loading, "load_parallel_runner", lambda *arguments: calls.append("load"))
    config = ModelConfig.from_dict(json.loads((Path(cores.__file__).parent / "nano" / "config.json").read_text()))
    loading.load_runner(EngineConfig(device="cpu", tensor_parallel=2), config, tmp_path, 64)
    assert calls == ["settle", "load"]
