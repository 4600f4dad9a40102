"""The checks of csrc/checked.h, in the builds that have them: each wrong argument ends the process with its name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from qvl_kernels.cpu.library import library

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(not library().checked, reason="this build does not check arguments: make asan, make ubsan"),
]
START = """
import torch
from dataclasses import replace
from qvl_kernels import cpu
from qvl_kernels.cpu.linears import PackedWeight
from tests.kernels.gptq import checkpoint
g_idx = torch.arange(128).roll(5) // 32
qweight, qzeros, scales, _ = checkpoint(128, 32, 32)
w = PackedWeight.from_packed(cpu.pack_gptq(qweight, qzeros, scales, g_idx, 4, 1))
x, cache = torch.zeros(1, 128), torch.zeros(3, 2, 16, 32)
def attend(table, starts, contexts):
    cpu.paged_attention(torch.zeros(1, 2, 32), cache, cache, torch.tensor([table]), starts, contexts)
def rotate(slot):
    tables = torch.zeros(1, 32), torch.zeros(1, 32), torch.ones(1)
    cpu.rotary_to_cache(torch.zeros(1, 3 * 2 * 32), *tables, cache, cache, torch.tensor([slot]))
"""
RIGHT = [
    "w.exact(x), w.int8(x), w.unpacked(0, 16, torch.float32)",
    "cpu.embedding(torch.tensor([0, 6]), torch.zeros(7, 16))",
    "attend([2, 1], [0, 1], [17]), attend([2, 999], [0, 1], [16])",
    "rotate(47)",
]
WRONG = {
    "perm": "p = w.perm.clone(); p[3] = 128; replace(w, perm=p).exact(x)",
    "perm, rounded": "p = w.perm.clone(); p[3] = 0x7fffffff; replace(w, perm=p).int8(x)",
    "perm, unpacked": "p = w.perm.clone(); p[3] = -2; replace(w, perm=p).unpacked(0, 16, torch.float32)",
    "outputs": "w.unpacked(16, 32, torch.float32)",
    "padded": "replace(w, padded=100).exact(x)",
    "bits": "replace(w, bits=5).exact(x)",
    "token id": "cpu.embedding(torch.tensor([0, 7]), torch.zeros(7, 16))",
    "negative token id": "cpu.embedding(torch.tensor([-1]), torch.zeros(7, 16))",
    "block": "attend([2, 3], [0, 1], [17])",
    "negative block": "attend([-1, 0], [0, 1], [17])",
    "context": "attend([2, 1], [0, 1], [33])",
    "rows": "attend([2, 1], [0, 2], [1])",
    "slot": "rotate(48)",
    "negative slot": "rotate(-1)",
}


def ran(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", START + code], capture_output=True, text=True, env=os.environ)


def test_what_is_right_runs() -> None:
    done = ran("\n".join(RIGHT))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("code", WRONG.values(), ids=WRONG)
def test_what_is_wrong_ends_the_process(code: str) -> None:
    done = ran(code)
    assert done.returncode == -signal.SIGABRT and "does not hold" in done.stderr, done.stderr
