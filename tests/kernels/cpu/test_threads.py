"""The thread pool: equal results for any number of threads, after a fork, with concurrent callers, and at exit."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from qvl_kernels import cpu
from tests.kernels.conftest import AVAILABLE

pytestmark = [pytest.mark.unit, pytest.mark.skipif(not AVAILABLE, reason="the CPU kernels were not built")]

SETUP = """
import os, torch
from qvl_kernels import cpu
torch.manual_seed(0)
weight, x = torch.randn(2048, 256), torch.randn(3, 256)
torch.set_num_threads(3)
want = cpu.linear(x, weight)
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", SETUP + code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_results_do_not_depend_on_the_number_of_threads(rng: torch.Generator) -> None:
    """Chunks do not depend on the number of threads, so results are bitwise equal."""
    weight, x = torch.randn(2048, 256, generator=rng), torch.randn(3, 256, generator=rng)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            results += [cpu.linear(x, weight) for _ in range(20)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, results[0]) for y in results)


def test_several_callers_at_once(rng: torch.Generator) -> None:
    weight, x = torch.randn(2048, 256, generator=rng), torch.randn(16, 3, 256, generator=rng)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        want = [cpu.linear(part, weight) for part in x]
        with ThreadPoolExecutor(4) as callers:
            got = list(callers.map(lambda part: cpu.linear(part, weight), [*x] * 4))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(got, want * 4, strict=True))


def test_a_forked_child_creates_its_own_pool() -> None:
    code = """
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(cpu.linear(x, weight), want) else 1)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), torch.equal(cpu.linear(x, weight), want))
"""
    assert run(code) == "0 True\n"


def test_the_interpreter_exits_while_workers_sleep() -> None:
    assert run("import time; time.sleep(0.05); print('done')") == "done\n"
