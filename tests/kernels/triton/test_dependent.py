"""Which launches overlap with the one before them."""

from __future__ import annotations

import pytest

from qvl_kernels.triton import dependent
from qvl_kernels.triton.launch import Launch

pytestmark = pytest.mark.unit


class Kernel:
    """Takes the place of a jit function, and remembers its options."""

    def __init__(self) -> None:
        self.options: dict[str, object] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Kernel:
        return self

    def __call__(self, **options: object) -> None:
        self.options = options


def test_few_rows_overlap_where_the_gpu_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QVL_DEPENDENT_LAUNCH", raising=False)
    monkeypatch.setattr(dependent, "interpreted", lambda: True)
    assert not dependent.dependent(90, 1), "the interpreter runs one kernel after another"
    monkeypatch.setattr(dependent, "interpreted", lambda: False)
    assert dependent.dependent(90, 1) and dependent.dependent(100, 127)
    assert not dependent.dependent(89, 1) and not dependent.dependent(90, 128)
    monkeypatch.setenv("QVL_DEPENDENT_LAUNCH", "0")
    assert not dependent.dependent(90, 1)


def test_the_attribute_goes_with_the_constant() -> None:
    for overlaps in (False, True):
        kernel = Kernel()
        Launch(kernel, (1,), {}, {"PDL": overlaps}).run()
        assert kernel.options.get("launch_pdl", False) is overlaps


def test_prefetch_is_one_instruction_of_whole_16_bytes() -> None:
    assert "cp.async.bulk.prefetch.L2.global [$1], 2048;" in dependent.prefetch_ptx(2048)
    assert "griddepcontrol.wait" in dependent.ptx("wait") and "launch_dependents" in dependent.ptx("launch")
