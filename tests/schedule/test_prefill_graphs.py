"""Prefill by graphs against prefill without: buckets, padding, several prompts, on a fake of CUDA's graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.serving.workload import all_together, one_at_a_time, random_requests
from qvl_kernels import reference
from qvl_runtime import Engine
from qvl_runtime.schedule.decode_graphs import Captured
from qvl_runtime.schedule.prefill_graphs import BUCKETS, LEAST_ROWS, MOST_REQUESTS, PrefillGraphs
from qvl_runtime.schedule.runner import Chunk
from tests.schedule.drive import checkpoint
from tests.schedule.fake_graphs import FakeCapture

pytestmark = pytest.mark.cpu
LONGEST = 512


def new_engine() -> Engine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QVL_KERNELS", "reference")
        return Engine(checkpoint("nano", Path()), device="cpu", dtype="float32", max_model_len=LONGEST, max_running=4)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return new_engine()


@pytest.fixture
def graphs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> PrefillGraphs:
    """The engine computes prompts by graphs until the test is over."""
    runner = engine.core.runner
    runner.capture_prefill(FakeCapture(reference, monkeypatch), 320, LONGEST, (16, 64, 128, 320))
    assert runner.prefill_graphs is not None
    monkeypatch.setattr(runner, "prefill_graphs", runner.prefill_graphs)
    return runner.prefill_graphs


def test_the_same_tokens_with_graphs_and_without(engine: Engine, graphs: PrefillGraphs) -> None:
    """Requests that come and go, with images, prefixes found and preemptions: graphs change no token."""
    wanted = random_requests(engine, 6, 81)
    alone = one_at_a_time(engine, wanted)
    assert graphs.replays > len(wanted) // 2, "prompts alone have a graph"
    together = all_together(engine, wanted, preempt=True)
    assert engine.report()["prefill_graphs"]["rows"] == [16, 64, 128, 320]
    eager = one_at_a_time(new_engine(), wanted)  # finds no prefix that a graph has computed
    assert alone == eager
    for got, want, w in zip(together, eager, wanted, strict=True):
        assert got is None or got == want, w


@pytest.mark.parametrize("counts", [(5,), (16,), (17,), (7, 64, 9), (128,), (5,) * MOST_REQUESTS])
def test_padding_changes_no_state_and_no_cache(engine: Engine, graphs: PrefillGraphs, counts: tuple[int, ...]) -> None:
    """Each bucket full and with a rest, one prompt and many, after other tokens: the same states, keys and values."""
    runner, found = engine.core.runner, []
    sequences = [runner.cache.sequence(1.0 if r % 2 else 3.0) for r in range(len(counts))]
    for by_graph in (True, False):
        runner.prefill_graphs = graphs if by_graph else None
        for r, sequence in enumerate(sequences):
            sequence.truncate(0)
            runner.run([Chunk(sequence, [*range(r, 2 * r + 1)])])
        replays = graphs.replays
        chunks = [
            Chunk(s, [*range(40 + r, 40 + r + n)]) for r, (s, n) in enumerate(zip(sequences, counts, strict=True))
        ]
        logits = runner.compute(chunks)([*range(sum(counts))]).clone()
        assert graphs.replays == replays + by_graph
        used = torch.tensor([block for sequence in sequences for block in sequence.blocks])
        found.append([logits, *(t[used].clone() for t in runner.cache.layers[-1])])
    for sequence in sequences:
        sequence.close()
    for ours, eager in zip(*found, strict=True):
        both = ours.isfinite() & eager.isfinite()
        assert (ours - eager)[both].abs().max() <= 1e-5 * eager[both].abs().max()  # a few roundings of float32


def test_which_steps_have_a_graph(graphs: PrefillGraphs) -> None:
    assert graphs.can_run([LEAST_ROWS]) and graphs.can_run([128]) and graphs.can_run([64, 64])
    assert not graphs.can_run([321]) and not graphs.can_run([64, 1]), "a longer step, and one that decodes too"
    assert not graphs.can_run([LEAST_ROWS] * (MOST_REQUESTS + 1))


def test_padding_divides_as_the_step_itself_would() -> None:
    """As many tiles of 64 and of 128 rows with padding as without."""
    for rows in range(1, BUCKETS[-1] + 1):
        padded = next(n for n in BUCKETS if n >= rows)
        assert rows <= 32 or all(-(-rows // tile) == -(-padded // tile) for tile in (64, 128)), rows


def test_steps_without_a_graph_are_counted(engine: Engine, graphs: PrefillGraphs) -> None:
    with engine.core.runner.cache.sequence(1.0) as sequence:
        engine.core.runner.compute([Chunk(sequence, [7] * 330)])
    assert graphs.report()["steps_without"] == 1 and graphs.replays == 0


def test_what_cannot_be_captured_is_said(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    def capture(function: Callable[[], Tensor]) -> Captured:
        raise RuntimeError("CUDA out of memory\nof the rest")

    capture.nbytes = None  # type: ignore[attr-defined]
    runner = engine.core.runner
    runner.capture_prefill(capture, 64, LONGEST, (16, 64))
    graphs, runner.prefill_graphs = runner.prefill_graphs, None
    assert graphs is not None and not graphs.can_run([16])
    assert graphs.report()["refused"] == {64: "CUDA out of memory"}
    assert "prompts of up to 64 tokens run without CUDA graphs, some 20 ms slower: CUDA out of memory" in caplog.text
