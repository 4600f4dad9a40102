"""RMSNorm and LayerNorm in Triton's interpreter, against their definitions."""

from __future__ import annotations

import pytest
import torch

from qvl_kernels import reference
from qvl_kernels.triton import norms
from tests.kernels.compare import as_good_as_torch

pytestmark = pytest.mark.interpreter
SHAPES = [(1, 16), (2, 255), (7, 257), (16, 1), (17, 1664), (2, 3, 64), (0, 32)]
EPS = 1e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rms_norm(poisoned: None, rng: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = (torch.randn(s, generator=rng).to(dtype) * 3 for s in (shape, shape[-1:]))
    want = reference.rms_norm(x.double(), weight.double(), EPS)
    as_good_as_torch(norms.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS), want)


@pytest.mark.parametrize("shape", [(1, 16), (7, 257), (17, 1664), (0, 32)])
@pytest.mark.parametrize("splits", [0, 1, 2, 7])
def test_add_rms_norm(poisoned: None, rng: torch.Generator, shape: tuple[int, ...], splits: int) -> None:
    x, weight = (torch.randn(s, generator=rng).half() for s in (shape, shape[-1:]))
    update = torch.randn(splits, *shape, generator=rng) if splits else torch.randn(shape, generator=rng).half()
    total, y = norms.add_rms_norm(x, update, weight, EPS)
    assert torch.equal(total, x + (update.sum(0).half() if splits else update))
    want = reference.rms_norm(total.double(), weight.double(), EPS)
    as_good_as_torch(y, reference.rms_norm(total, weight, EPS), want)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("update", [False, True])
def test_layer_norm(poisoned: None, rng: torch.Generator, shape: tuple[int, ...], update: bool) -> None:
    x, more = (torch.randn(shape, generator=rng).half() * 3 for _ in range(2))
    weight, bias = (torch.randn(shape[-1], generator=rng).half() for _ in range(2))
    if update:
        total, y = norms.add_layer_norm(x, more, weight, bias, EPS)
        assert torch.equal(total, x + more)
    else:
        total, y = x, norms.layer_norm(x, weight, bias, EPS)
    want = reference.layer_norm(*(t.double() for t in (total, weight, bias)), EPS)
    as_good_as_torch(y, reference.layer_norm(total, weight, bias, EPS), want)


def test_layer_norm_of_a_large_mean_does_not_cancel(rng: torch.Generator) -> None:
    x = torch.randn(3, 1664, generator=rng) + 1e4
    one, none = torch.ones(1664), torch.zeros(1664)
    want = reference.layer_norm(*(t.double() for t in (x, one, none)), EPS)
    as_good_as_torch(norms.layer_norm(x, one, none, EPS), reference.layer_norm(x, one, none, EPS), want)


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(3, 32).half()
    with pytest.raises(ValueError, match=r"rms_norm: weight is float16 \[31\]; expected contiguous float16 \[32\]"):
        norms.rms_norm(x, x[0, :31], EPS)
    with pytest.raises(ValueError, match="update is float16"):
        norms.add_rms_norm(x, torch.zeros(2, 3, 32).half(), x[0], EPS)
    with pytest.raises(ValueError, match=r"strided; expected contiguous"):
        norms.rms_norm(x.t(), x[0, :3], EPS)
    with pytest.raises(ValueError, match="has 20000 channels"):
        norms.rms_norm(torch.zeros(1, 20000), torch.zeros(20000), EPS)
