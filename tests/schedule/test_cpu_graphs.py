"""Decode steps replayed from recorded kernel calls: the same logits, to the bit, as op by op."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.serving.workload import all_together, greedy, image, prompt_of, random_requests
from qvl_kernels.cpu import library as cpu_library
from qvl_runtime import Engine
from qvl_runtime.schedule.cpu_graphs import CpuCapture
from qvl_runtime.schedule.decode_graphs import DecodeGraphs
from qvl_runtime.schedule.runner import Chunk
from tests.kernels.conftest import AVAILABLE
from tests.schedule.drive import checkpoint

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(not AVAILABLE, reason="the CPU kernels were not built")]
MOST, LONGEST = 6, 2048
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "nano": ("nano", {}),
    "nano in float32": ("nano", {"dtype": "float32"}),
    "nano Int4": ("nano_int4", {}),
    "nano Int4, fast, int8 cache": ("nano_int4", {"precision": "fast", "kv_dtype": "int8"}),
    "tiny Int4": ("tiny-int4", {}),
    "tiny Int4, fast, int8 cache": ("tiny-int4", {"precision": "fast", "kv_dtype": "int8"}),
}


@pytest.fixture(scope="module", params=KINDS)
def make(request: pytest.FixtureRequest) -> Callable[..., Engine]:
    name, options = KINDS[request.param]
    golden = request.getfixturevalue("one_golden") if name.startswith("tiny") else Path()
    return partial(Engine, checkpoint(name, golden), device="cpu", max_model_len=LONGEST, max_running=MOST, **options)


@pytest.fixture(scope="module")
def engine(make: Callable[..., Engine]) -> Engine:
    return make()


@pytest.fixture
def nano() -> Engine:
    return Engine(checkpoint("nano_int4", Path()), device="cpu", precision="fast", max_model_len=LONGEST)


@pytest.fixture
def graphs(engine: Engine) -> Iterator[DecodeGraphs]:
    """The engine's graphs, there again after the test."""
    runner = engine.core.runner
    assert runner.graphs is not None
    yield (found := runner.graphs)
    runner.graphs = found


def test_the_same_tokens_with_graphs_and_without(make: Callable[..., Engine]) -> None:
    """Requests that come and go, with images, prefixes found and preemptions: graphs change no token."""
    by_graphs, op_by_op = make(), make(graphs=False)
    wanted = [w._replace(max_tokens=2 * w.max_tokens) for w in random_requests(by_graphs, 16, 80)]
    assert all_together(by_graphs, wanted, preempt=True) == all_together(op_by_op, wanted, preempt=True)
    assert by_graphs.report()["graphs"]["replays"] > 10
    assert op_by_op.report()["graphs"] is None


def test_the_same_logits_while_tables_grow(engine: Engine, graphs: DecodeGraphs) -> None:
    """Over many blocks, for one request and for two of different length; recorded when the tables were short."""
    runner = engine.core.runner
    with runner.cache.sequence(1.0) as first, runner.cache.sequence(3.0) as second:
        for sequence, length in ((first, 3), (second, 120)):
            runner.run([Chunk(sequence, list(range(length)))])
        for step in range(70):
            both = (first, second)[: 1 + step % 2]
            found = []
            for by_graph in (True, False):
                runner.graphs = graphs if by_graph else None
                found.append(runner.compute([Chunk(s, [step]) for s in both])([*range(len(both))]).clone())
                for sequence in both:
                    sequence.truncate(sequence.length - by_graph)
            assert torch.equal(*found), step
        assert len(first.blocks) > 4


def test_steps_of_any_number_of_rows_have_graphs(engine: Engine, graphs: DecodeGraphs) -> None:
    prompts = [prompt_of(engine, [r, 1, 2]) for r in range(MOST)]
    before = graphs.report()["replays"]
    answers = [out.token_ids for out in engine.generate(prompts, greedy(6))]
    report = engine.report()["graphs"]
    assert report["refused"] == {} and report["without_head"] == [] and report["replays"] == before + 5
    engine.core.runner.graphs = None
    assert [out.token_ids for out in engine.generate(prompts, greedy(6))] == answers


def test_memory_is_shared_by_all_numbers_of_rows(nano: Engine) -> None:
    """Counted, and not much more than what the most rows need."""
    graphs = nano.core.runner.graphs
    assert graphs is not None and graphs.report()["bytes"] == 0
    nano.generate([prompt_of(nano, [r, 1, 2]) for r in range(8)], greedy(4))
    most = graphs.report()["bytes"]
    for rows in range(1, 8):
        nano.generate([prompt_of(nano, [r, 1, 2]) for r in range(rows)], greedy(4))
    assert 0 < most <= graphs.report()["bytes"] <= 2 * most


@pytest.mark.parametrize("name", AVAILABLE[1:])
def test_other_kernels_are_recorded_again(nano: Engine, name: str) -> None:
    prompt = prompt_of(nano, [5, 6], image(1), [7])
    found = [nano.generate([prompt], greedy(12))[0].token_ids]
    graphs = nano.core.runner.graphs
    assert graphs is not None
    graph: Any = graphs._bucket(1).graph
    with cpu_library.instruction_set(name) as library:
        nano.generate([prompt], greedy(12))
        assert graph._recording.library is library
    found.append(nano.generate([prompt], greedy(12))[0].token_ids)
    assert graph._recording.library is cpu_library.library() and found[0] == found[1]


def test_it_is_switched_off_by_the_engine_s_option() -> None:
    engine = Engine(device="cpu", max_model_len=64, graphs=False)
    assert engine.core.runner.graphs is None and engine.report()["graphs"] is None


def test_plain_torch_has_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVL_KERNELS", "reference")
    assert Engine(device="cpu", max_model_len=64).core.runner.graphs is None


def test_an_interrupted_recording_is_made_again(nano: Engine) -> None:
    """Ctrl-C in the middle of the first step: the next one records."""
    x, interrupted = torch.ones(2, 16), [True]

    def function() -> Tensor:
        if interrupted:
            interrupted.clear()
            raise KeyboardInterrupt
        return nano.core.runner.model.ops.gelu(x)

    graph = CpuCapture()(function)
    with pytest.raises(KeyboardInterrupt):
        graph()
    want = graph().clone()
    x.mul_(2)
    assert graph.fallback_reason is None and not torch.equal(graph(), want)
