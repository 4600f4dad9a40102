"""The simulation of more threads: chunks are those of the kernels, and they are dealt as the pool deals them."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cpu.split import dealt, int4
from qvl_kernels import cpu
from qvl_kernels.cpu.library import library
from tests.kernels.conftest import AVAILABLE

pytestmark = pytest.mark.unit


def test_chunks_go_to_the_thread_that_is_free_first() -> None:
    shares = dealt([[4, 1, 1, 1, 1], [3]], 2)
    assert (shares.work, shares.longest) == (11.0, 4.0 + 3.0)
    assert shares.over(2) == pytest.approx(14 / 11)
    assert dealt([[2] * 8], 4).over(4) == 1


@pytest.mark.skipif(not AVAILABLE, reason="the CPU kernels were not built")
@pytest.mark.parametrize("threads", [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64])
def test_one_row_is_split_evenly(threads: int) -> None:
    """2 MiB of weights: rounds of 128 KiB chunks, and what is left in one of 64 KiB or more for each thread."""
    linear, x = int4(128 * 256, 128, "fast"), torch.randn(1, 128)
    want, split = linear(x), list[torch.Tensor]()
    *_, blocks = library().chunks(lambda: split.append(linear(x)), threads)
    assert torch.equal(split[0], want)
    whole = 16 // threads * threads
    left = len(blocks) - whole
    sizes = [128 << 10] * whole + [(16 - whole << 17) // max(left, 1)] * left
    assert dealt([sizes], threads).over(threads) < 1.2 * max(1, threads / 32), (
        "16 equal chunks: 1.5 with 12 or 24 threads"
    )
    assert library().chunks(lambda: None, threads) == []


@pytest.mark.skipif(not AVAILABLE, reason="the CPU kernels were not built")
def test_a_log_that_is_too_small_is_an_error() -> None:
    x = torch.randn(4, 100_000)
    with pytest.raises(ValueError, match=r"the calls have \d+ chunks and parts, and the log holds 3"):
        library().chunks(lambda: cpu.gelu(x), 2, capacity=3)
    assert len(library().chunks(lambda: cpu.gelu(x), 2)[0]) == 25  # the log has ended: chunks of 16384 elements
