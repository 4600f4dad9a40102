"""Recorded kernel calls: replays compute from changed values, and what cannot be recorded is rejected."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qvl_kernels import cpu
from qvl_kernels.cpu import library as cpu_library
from qvl_kernels.cpu.replay import Arena, Recording
from tests.kernels.conftest import AVAILABLE

pytestmark = [pytest.mark.unit, pytest.mark.skipif(not AVAILABLE, reason="the CPU kernels were not built")]


def chain(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """A chain of ops, each with a result that is no longer needed two ops later."""

    def run() -> Tensor:
        y = x
        for _ in range(6):
            y, normed = cpu.add_rms_norm(y, cpu.gelu(y), weight, 1e-6)
            y = cpu.swiglu(cpu.concat_outputs(y, normed))
        return cpu.linear(y, square)

    square = torch.randn(x.shape[1], x.shape[1], generator=torch.Generator().manual_seed(1)).to(x.dtype)
    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replay_computes_what_the_function_would(isa: str, rng: torch.Generator, dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 64, generator=rng).to(dtype), torch.rand(64, generator=rng).to(dtype)
    function, arena = chain(x, weight), Arena()
    recording, first = Recording.of(function, arena)
    assert recording.fallback_reason is None and torch.equal(first, function())
    for _ in range(3):
        x.copy_(torch.randn(3, 64, generator=rng))
        assert torch.equal(recording.replay(), function())


def test_recordings_share_the_memory_of_an_arena(rng: torch.Generator) -> None:
    """Freed memory is reused: 18 results of each recording use the memory of a few, shared by all recordings."""
    arena, weight = Arena(), torch.ones(64)
    inputs = [torch.randn(rows, 64, generator=rng) for rows in (4, 1, 3)]
    recordings = [Recording.of(chain(x, weight), arena)[0] for x in inputs]
    assert arena.nbytes <= 8 * inputs[0].nbytes
    for _ in range(2):
        for x, recording in zip(inputs, recordings, strict=True):
            assert torch.equal(recording.replay(), chain(x, weight)())


def test_the_memory_of_a_live_result_is_not_reused(rng: torch.Generator) -> None:
    arena, x = Arena(), torch.randn(2, 64, generator=rng)
    _, result = Recording.of(lambda: cpu.gelu(x), arena)
    copy = result.clone()
    Recording.of(lambda: cpu.gelu(x + 1), arena)
    assert torch.equal(result, copy)


def test_what_cannot_be_recorded_is_rejected(rng: torch.Generator) -> None:
    """Torch ops, and host numbers that a replay cannot update; the run still returns its result."""
    x = torch.randn(2, 64, generator=rng)
    cache = torch.zeros(2, 1, 16, 64)
    attend = (x.view(2, 1, 64), cache, cache, torch.tensor([[0], [1]]))
    tensors = torch.tensor([0, 1, 2]), torch.tensor([3, 4])
    for function, reason in (
        (lambda: cpu.gelu(x) * 2, "mul runs in torch"),
        (lambda: cpu.gelu(x.t()), "clone runs in torch"),
        (lambda: cpu.gelu(x.add_(0)), "add_ runs in torch"),
        (lambda: cpu.gelu(x.double()), "runs in torch"),
        (lambda: torch.cat([x, x]), "cat runs in torch"),
        (lambda: cpu.linear(x.repeat(3, 1), torch.ones(3, 64)), "runs in torch"),
        (lambda: cpu.paged_attention(*attend, [0, 1, 2], [3, 4]), "attention is passed numbers on the host"),
        (lambda: cpu.paged_attention(*attend, *tensors), None),
        (lambda: cpu.gelu(x.view(4, 32)[1:].contiguous()), None),
    ):
        recording, result = Recording.of(function, Arena())
        assert torch.equal(result, function())  # type: ignore[no-untyped-call]
        actual = recording.fallback_reason
        assert actual is None if reason is None else actual is not None and reason in actual, (actual, reason)


def test_a_replay_reads_the_current_lengths(rng: torch.Generator) -> None:
    """Attention over block tables and lengths that change between replays."""
    q, (k, v) = torch.randn(2, 2, 32, generator=rng), torch.randn(2, 5, 2, 16, 32, generator=rng)
    tables, starts, lengths = torch.tensor([[0, 1], [2, 3]]), torch.arange(3), torch.tensor([5, 16])
    recording, _ = Recording.of(lambda: cpu.paged_attention(q, k, v, tables, starts, lengths), Arena())
    for new_lengths in ([1, 1], [17, 32], [31, 2]):
        lengths.copy_(torch.tensor(new_lengths))
        tables.copy_(torch.randperm(5, generator=rng)[:4].view(2, 2))
        want = cpu.paged_attention(q, k, v, tables, [0, 1, 2], new_lengths)
        assert torch.equal(recording.replay(), want)


def test_only_the_calls_of_one_thread_are_recorded(rng: torch.Generator) -> None:
    x, other = torch.randn(2, 64, generator=rng), torch.randn(2, 64, generator=rng)

    def function() -> Tensor:
        thread = threading.Thread(target=lambda: cpu.gelu(other))
        thread.start()
        thread.join()
        return cpu.gelu(x)

    recording, _ = Recording.of(function, Arena())
    alone, _ = Recording.of(lambda: cpu.gelu(x), Arena())
    assert len(recording) == len(alone) == 1


def test_threads_follow_torch(rng: torch.Generator) -> None:
    x, before = torch.randn(64, 512, generator=rng), torch.get_num_threads()
    recording, first = Recording.of(lambda: cpu.gelu(x), Arena())
    want = first.clone()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(recording.replay(), want)
            assert cpu_library.library().threads == threads
    finally:
        torch.set_num_threads(before)


def test_a_run_that_fails_leaves_nothing_recorded(rng: torch.Generator) -> None:
    def fails() -> Tensor:
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        Recording.of(fails, Arena())
    library = cpu_library.library()
    assert library.ready() is library.kernels
