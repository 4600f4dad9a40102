"""Steps launched ahead by the GPU's kernels, in Triton's interpreter: the host never waits for the device."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from qvl_runtime.schedule.computing import Computing
from qvl_runtime.schedule.overlap import Overlap
from tests.schedule.test_overlap import KINDS, content, engine_of

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: make setup"),
]


def test_nothing_is_read_on_the_host_until_the_next_step_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the GPU's kernels: one value read on the way would wait for the device, and leave it without work."""
    from qvl_kernels.triton.launch import Launch

    kinds = [replace(KINDS["penalties"], max_tokens=2, min_tokens=2, stop_token_ids=(1,))]
    asked = [{"token_ids": [7]}]
    want = [content(one) for one in engine_of(False).generate(asked, kinds)]
    monkeypatch.setenv("QVL_KERNELS", "triton")
    engine, forbidden = engine_of(True, adapters=None), [False]
    for name in ("tolist", "item", "nonzero", "__bool__", "__int__", "__float__"):
        function = getattr(torch.Tensor, name)

        def checked(*given: Any, _name: str = name, _function: Any = function) -> Any:
            assert not forbidden[0], f"{_name} waits for the device"
            return _function(*given)

        monkeypatch.setattr(torch.Tensor, name, checked)

    def during(function: Any, value: bool) -> Any:
        def run(*given: Any, **named: Any) -> Any:
            before, forbidden[0] = forbidden[0], value
            try:
                return function(*given, **named)
            finally:
                forbidden[0] = before

        return run

    monkeypatch.setattr(Launch, "run", during(Launch.run, False))  # the interpreter itself
    monkeypatch.setattr(Computing, "sample", during(Computing.sample, True))
    monkeypatch.setattr(Overlap, "launch_next", during(Overlap.launch_next, True))
    found = [content(one) for one in engine.generate(asked, kinds)]
    assert [[answer[1] for answer in one] for one in found] == [[answer[1] for answer in one] for one in want]
    assert engine.core.overlap is not None and engine.core.overlap.steps == 1
