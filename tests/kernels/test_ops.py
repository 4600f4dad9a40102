"""Every implementation of the ops has all ops of the protocol, with the same signatures."""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from types import ModuleType

import pytest

from qvl_kernels import cpu, reference
from qvl_kernels.ops import Ops

pytestmark = pytest.mark.unit
NAMES = sorted(name for name in vars(Ops) | vars(Ops.__mro__[1]) if not name.startswith("_"))


def implementations() -> list[ModuleType]:
    if find_spec("triton") is None:
        return [reference, cpu]
    from qvl_kernels import triton
    from qvl_kernels.triton import invariant

    return [reference, cpu, triton, invariant]


def parameters(function: object) -> list[tuple[str, object]]:
    """Return names and defaults, without `self`."""
    signature = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in signature if p.name != "self"]


@pytest.mark.parametrize("ops", implementations(), ids=lambda ops: ops.__name__)
def test_it_offers_the_protocol(ops: ModuleType) -> None:
    assert len(NAMES) > 20
    assert "gptq" in ops.LAYOUTS
    for name in NAMES:
        if name == "LAYOUTS":
            continue
        expected = getattr(Ops, name)
        assert parameters(getattr(ops, name)) == parameters(expected), f"{ops.__name__}.{name}"
        assert name in ops.__all__, f"{ops.__name__} does not export {name}"
