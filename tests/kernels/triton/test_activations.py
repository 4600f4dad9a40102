"""SwiGLU and GELU in Triton's interpreter, against their definitions."""

from __future__ import annotations

import pytest
import torch

from qvl_kernels import reference
from qvl_kernels.triton import activations
from tests.kernels.compare import as_good_as_torch

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("width", [1, 255, 257, 2049])
@pytest.mark.parametrize("splits", [0, 1, 3])
def test_swiglu(poisoned: None, rng: torch.Generator, rows: int, width: int, splits: int) -> None:
    shape = (splits, rows, 2 * width) if splits else (rows, 2 * width)
    x = torch.randn(shape, generator=rng) * 4
    x = x if splits else x.half()
    whole = (x.sum(0).half() if splits else x).double()
    want = whole[:, :width] * torch.nn.functional.silu(whole[:, width:])
    as_good_as_torch(activations.swiglu(x, torch.float16), reference.swiglu(x, torch.float16), want)


@pytest.mark.parametrize("n", [0, 1, 255, 1025])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gelu(poisoned: None, rng: torch.Generator, n: int, dtype: torch.dtype) -> None:
    x = (torch.randn(n, generator=rng) * 4).to(dtype)
    as_good_as_torch(activations.gelu(x), reference.gelu(x), torch.nn.functional.gelu(x.double()))


def test_far_from_zero(poisoned: None) -> None:
    """Where exp would overflow or vanish, and where one of a pair that shares a reciprocal does."""
    x = torch.tensor([-6e4, -100.0, -41.0, -30.0, 0.0, 30.0, 100.0, 6e4])
    as_good_as_torch(activations.gelu(x), reference.gelu(x), torch.nn.functional.gelu(x.double()))
    for gate in (x.repeat(64).sort().values, x.repeat(64), x[:1].repeat(512)):
        both = torch.cat([torch.ones_like(gate), gate])[None].half()  # 6e4 is a float16, 2e-13 is 0
        want = torch.nn.functional.silu(both[:, len(gate) :].double())
        as_good_as_torch(activations.swiglu(both), reference.swiglu(both), want)


def test_gelu_of_what_is_no_number(poisoned: None) -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf])
    torch.testing.assert_close(activations.gelu(x), torch.tensor([torch.nan, torch.inf, 0.0]), equal_nan=True)


def test_gelu_s_polynomial_is_good_to_4_roundings_of_x(poisoned: None) -> None:
    x = torch.linspace(-12, 12, 4801)
    error = activations.gelu(x).double() - torch.nn.functional.gelu(x.double())
    assert (error.abs() <= 4 * 2**-23 * x.abs()).all()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"swiglu: up_gate is float16 \[1, 2, 8\]; expected contiguous float32"):
        activations.swiglu(torch.zeros(1, 2, 8).half())
    with pytest.raises(ValueError, match="gelu: x is int32"):
        activations.gelu(torch.zeros(3, dtype=torch.int32))
