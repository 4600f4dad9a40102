"""The kernels' threads may use every CPU of the process, also where OpenMP binds the thread that loads torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from qvl_kernels.affinity import BINDS, allowed_cpus, openmp_places

pytestmark = pytest.mark.unit

CODE = """
import os

mask = os.sched_getaffinity
before = mask(0)
import torch
from qvl_kernels.affinity import openmp_places
from qvl_kernels.numa import nodes_in_use, nodes_of
from qvl_runtime.cores import settle_threads, usable_cores

bound, nodes = mask(0), nodes_in_use()
found = usable_cores()
settle_threads()
torch.ones(1 << 20).exp()
print(len(openmp_places()), bound == before, found.logical == len(before), mask(0) == before, end=" ")
print(list(nodes) == nodes_of(before), torch.get_num_threads() == found.threads)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or len(allowed_cpus()) < 2, reason="needs Linux and two CPUs")
@pytest.mark.parametrize("setting", [{"OMP_PROC_BIND": "true"}, {"OMP_PLACES": "threads"}, {}])
def test_a_bound_thread_is_released(setting: dict[str, str]) -> None:
    left_out = {*BINDS, "OMP_NUM_THREADS", "MKL_NUM_THREADS"}
    environment = {name: value for name, value in os.environ.items() if name not in left_out} | setting
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    places, was_free, *fine = done.stdout.split()
    assert fine == ["True"] * 4
    assert was_free == "True" or int(places) > 1


def test_nothing_is_asked_of_openmp_that_does_not_bind(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BINDS:
        monkeypatch.delenv(name, raising=False)
    assert openmp_places() == []
