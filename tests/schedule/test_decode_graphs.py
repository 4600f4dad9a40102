"""Decoding by graphs against decoding without: buckets, padding, static buffers, all on a fake of CUDA's graphs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks.serving.workload import all_together, greedy, image, one_at_a_time, prompt_of, random_requests
from qvl_kernels import reference
from qvl_runtime import Engine
from qvl_runtime.model.cache_layout import BLOCK_SIZE
from qvl_runtime.schedule.decode_graphs import BUCKETS, DecodeGraphs
from qvl_runtime.schedule.runner import Chunk
from tests.schedule.drive import checkpoint
from tests.schedule.fake_graphs import FakeCapture

pytestmark = pytest.mark.cpu
MOST, LONGEST = 11, 512


@pytest.fixture(scope="module", params=["nano", "nano_int4"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QVL_KERNELS", "reference")
        folder = checkpoint(request.param, Path())
        return Engine(folder, device="cpu", dtype="float32", max_model_len=LONGEST, max_running=MOST)


@pytest.fixture
def graphs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> DecodeGraphs:
    """The engine decodes by graphs until the test is over."""
    runner = engine.core.runner
    runner.capture(FakeCapture(reference, monkeypatch), MOST, LONGEST)
    assert runner.graphs is not None
    monkeypatch.setattr(runner, "graphs", runner.graphs)
    return runner.graphs


def test_the_same_tokens_with_graphs_and_without(engine: Engine, graphs: DecodeGraphs) -> None:
    """Requests that come and go, with images, prefixes found and preemptions: graphs change no token."""
    wanted = [w._replace(max_tokens=2 * w.max_tokens) for w in random_requests(engine, 16, 80)]
    by_graphs = all_together(engine, wanted, preempt=True)
    assert graphs.replays > 10
    replays, engine.core.runner.graphs = graphs.replays, None
    alone = one_at_a_time(engine, wanted)
    assert graphs.replays == replays
    for got, want, w in zip(by_graphs, alone, wanted, strict=True):
        assert got is None or got == want, w


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 11])
def test_padding_changes_no_logit_and_no_cache(engine: Engine, graphs: DecodeGraphs, rows: int) -> None:
    """Each bucket full and with a rest, by graph and eagerly, from the same cache: the same logits and keys."""
    runner = engine.core.runner
    sequences = [runner.cache.sequence(1.0 if r % 2 else 3.0) for r in range(rows)]
    found = []
    for by_graph in (True, False):
        runner.graphs = graphs if by_graph else None
        for r, sequence in enumerate(sequences):
            sequence.truncate(0)
            runner.run([Chunk(sequence, list(range(r, r + 3 + 7 * r)))])
        used = [block for sequence in sequences for block in sequence.blocks]
        before = [t.clone() for t in runner.cache.layers[-1]]
        logits = runner.compute([Chunk(s, [40 + r]) for r, s in enumerate(sequences)])([*range(rows)])
        used += [block for sequence in sequences for block in sequence.blocks]
        others = torch.tensor(sorted({*range(runner.cache.pool.num_blocks)} - {*used}))
        for tensor, old in zip(runner.cache.layers[-1], before, strict=True):
            assert torch.equal(tensor[others].view(torch.uint8), old[others].view(torch.uint8)), "a stranger's block"
        found.append((logits.clone(), [t[torch.tensor(used)].clone() for t in runner.cache.layers[-1]]))
    for sequence in sequences:
        sequence.close()
    (logits, caches), (eager, eager_caches) = found
    # a product of more rows may sum in another order: a few roundings of float32
    assert (logits - eager).abs().max() <= 1e-5 * eager.abs().max()
    assert torch.equal(logits.argmax(-1), eager.argmax(-1))
    for cache, other in zip(caches, eager_caches, strict=True):
        written = other.isfinite() & cache.isfinite()
        assert (cache - other)[written].abs().max() <= 1e-5 * other[written].abs().max()


def test_buckets(engine: Engine, graphs: DecodeGraphs) -> None:
    """Every number of rows up to the most has one, at most twice as large; prefill, drafts and more rows have none."""
    assert graphs.buckets == (1, 2, 4, 8, 11)
    assert all(a < b <= 2 * a for a, b in pairwise(BUCKETS))
    assert max(b - a for a, b in pairwise(BUCKETS)) <= BLOCK_SIZE, "padding has a slot each"
    assert graphs.can_run(MOST) and not graphs.can_run(MOST + 1)
    before = graphs.replays
    out = engine.generate([prompt_of(engine, [1, 2], image(7), [3])], greedy(4))[0]
    assert graphs.replays == before + len(out.token_ids) - 1, "the first token comes from the prefill, the rest do not"


def test_what_a_graph_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake is no rubber stamp: it refuses values read back, numbers of the host, and shapes that change."""
    capture, x = FakeCapture(reference, monkeypatch), torch.ones(3)
    for wrong in (lambda: x * float(x[0]), lambda: x + torch.tensor([1.0, 2.0, 3.0]), lambda: x[x > 0]):
        with pytest.raises(AssertionError, match="no CUDA graph holds that"):
            capture(wrong)
    rows = [2]
    captured = capture(lambda: reference.linear(torch.ones(rows[0], 3), torch.ones(3, 3)))
    rows[0] = 4
    with pytest.raises(AssertionError, match="captured as"):
        captured.replay()
    static = torch.zeros(3)
    doubled = capture(lambda: static * 2)
    static.fill_(4)
    assert doubled.output.tolist() == [0, 0, 0]
    doubled.replay()
    assert doubled.output.tolist() == [8, 8, 8]
