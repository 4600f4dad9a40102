"""Kernels in Triton's interpreter, or compiled and run by ttsem: float tensors hold NaN until they are written."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New tensors start as NaN, integers at their largest: a kernel that skips an element is found out."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def what_ttsem_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In ttsem, skip a test where it launches a kernel in Gluon, which has no TTIR to run; copy nothing to a GPU."""
    if os.environ["TRITON_INTERPRET"] == "1":
        return
    from qvl_kernels.triton.launch import Launch
    from qvl_runtime.schedule import readback

    run = Launch.run

    def run_unless_gluon(launch: Launch) -> None:
        if all(launch.grid) and getattr(launch.kernel, "is_gluon", bool)():
            pytest.skip("a kernel in Gluon, of which ttsem has nothing to run")
        run(launch)

    monkeypatch.setattr(Launch, "run", run_unless_gluon)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(readback, "_to_pinned", lambda tensor: tensor)
    monkeypatch.setattr(readback.Moment, "mark", lambda moment: None)
