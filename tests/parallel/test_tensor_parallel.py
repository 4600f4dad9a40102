"""A decoder split among processes answers like one process, and ends cleanly whatever becomes of them."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from qvl_runtime import Engine, SamplingParams
from qvl_runtime.engine.engine import NANO
from qvl_runtime.errors import ConfigError, GroupError
from qvl_runtime.model.qwen_vl import QwenVL
from qvl_runtime.parallel import leader
from qvl_runtime.parallel.leader import ParallelModel

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(sys.platform == "win32", reason="gloo and signals of POSIX")]
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
INT4 = {"model": NANO.with_name("nano_int4"), "kv_dtype": "int8"}
HOT = SamplingParams(temperature=1.5, seed=3, n=3, max_tokens=12, logprobs=2)


@contextmanager
def split(ranks: int = 2, **options: Any) -> Iterator[Engine]:
    engine = Engine(dtype="float32", max_model_len=512, tensor_parallel=ranks, **options)
    try:
        yield engine
    finally:
        ranks_of(engine).end("the test is over")
        del engine
        gc.collect()


def ranks_of(engine: Engine) -> Any:
    model = engine.core.runner.model
    assert isinstance(model, ParallelModel)
    return model.ranks


def pids(engine: Engine) -> list[int]:
    return [process.pid for process in ranks_of(engine)._processes]


def requests() -> list[tuple[Any, SamplingParams]]:
    """Texts and an image, greedy and drawn: chunks, forks within a block, hits of the prefix cache, scores."""
    image = {"image": str(NANO.parent / "assets" / "demo.jpg")}
    asked = [[image, {"text": question}] for question in ("Box the cat.", "What is there?", "Box the star.")]
    ids = [{"token_ids": list(range(5, 5 + n))} for n in (1, 21, 90)]
    return [(prompt, params) for prompt in (*asked, *ids) for params in (GREEDY, HOT)]


def answers(engine: Engine) -> list[Any]:
    prompts, params = zip(*requests(), strict=True)
    return [[answer.token_ids for answer in done.answers] for done in engine.generate(list(prompts), list(params))]


# nano's 4 heads are no 3 equal parts: `test_options_that_do_not_fit` has what is said then
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("options", [{}, INT4], ids=["dense", "Int4"])
def test_it_answers_like_one_process(options: dict[str, Any], ranks: int) -> None:
    one = Engine(dtype="float32", max_model_len=512, max_step_tokens=64, **options)
    expected, scored = answers(one), one.score({"token_ids": list(range(5, 40))})
    with split(ranks, max_step_tokens=64, **options) as engine:
        assert answers(engine) == expected
        assert answers(engine) == expected, "over what is cached"
        found = engine.score({"token_ids": list(range(5, 40))})
        assert (found.logprobs - scored.logprobs).abs().max() < 1e-4
        assert engine.report()["kernels"]["decoder"] == f"split among {ranks} processes, no graphs"
        engine.core.runner.cache.check_integrity()


def test_each_process_has_its_share_of_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    before, compute, seen = torch.get_num_threads(), QwenVL.forward, []

    def forward(self: QwenVL, *arguments: Any) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return compute(self, *arguments)

    monkeypatch.setattr(QwenVL, "forward", forward)
    torch.set_num_threads(4)
    try:
        with split() as engine:
            engine.generate([{"token_ids": [5, 6, 7]}], SamplingParams(temperature=0, max_tokens=3))
            assert set(seen) == {2} and torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_a_process_that_dies_is_named_and_the_next_engine_works(monkeypatch: pytest.MonkeyPatch) -> None:
    with split() as engine:
        with pytest.raises(ConfigError, match="one such engine a process"):
            Engine(tensor_parallel=2)
        assert engine.generate([{"token_ids": [5]}], GREEDY)[0].token_ids, "the other attempt has left it alone"
        os.kill(pids(engine)[0], signal.SIGKILL)
        time.sleep(0.2)
        for _ in range(2):
            with pytest.raises(GroupError, match="one of the 2 processes of this model has ended"):
                engine.generate([{"token_ids": [5]}, {"token_ids": [6]}], GREEDY)
    with split() as engine:
        assert engine.generate([{"token_ids": [5]}], GREEDY)[0].token_ids
        # A fault in a step, as Ctrl-C is: the others were told of it and wait for their sums.
        own = pids(engine)
        monkeypatch.setattr(engine.core.runner.model.decoder, "forward", lambda *_: 1 / 0)
        with pytest.raises(Exception, match=r"division by zero|ended by ZeroDivisionError"):
            engine.generate([{"token_ids": [5]}], GREEDY)
        monkeypatch.undo()
        with pytest.raises(GroupError, match="ended by ZeroDivisionError in a step: make it again"):
            engine.generate([{"token_ids": [5]}], GREEDY)
        assert all_end(own)


def test_a_process_that_cannot_start_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader, "PROGRAM", "raise SystemExit(3)")
    began = time.monotonic()
    with pytest.raises(GroupError, match="has ended as it started"):
        Engine(tensor_parallel=2)
    assert time.monotonic() - began < 20
    with pytest.raises(GroupError, match="has ended as it started"):  # and no process group is left
        Engine(tensor_parallel=2)


def test_nothing_is_left_when_the_first_is_killed() -> None:
    code = """
import sys, time
from qvl_runtime import Engine
engine = Engine(dtype="float32", max_model_len=256, tensor_parallel=2)
print(*(process.pid for process in engine.core.runner.model.ranks._processes), flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        others = [int(pid) for pid in first.stdout.readline().split()]
        assert others and all(map(is_running, others))
        first.kill()
    assert all_end(others)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel": 0}, "tensor_parallel is 0"),
        ({"tensor_parallel": 3}, "only among 1, 2, 4"),
        ({"tensor_parallel": 2, "synthetic": "qwen-vl-chat"}, "make_synthetic"),
        ({"tensor_parallel": 2, "adapters": {"a": "x"}}, "qvl merge"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Engine(**options)


def all_end(others: list[int]) -> bool:
    """Wait, at most 10 seconds, until these processes have ended."""
    deadline = time.monotonic() + 10
    while any(map(is_running, others)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(is_running, others))


def is_running(pid: int) -> bool:
    """Whether a process runs: neither gone nor a zombie that was not waited for."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
