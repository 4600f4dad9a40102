"""Dense linears with few rows in Triton's interpreter, against torch's own product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qvl_kernels import reference
from qvl_kernels import triton as ops
from qvl_kernels.triton.linear import configs, dense
from tests.kernels.compare import as_good_as_torch

pytestmark = pytest.mark.interpreter


def made(rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, generator=rng).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 9, 16])
@pytest.mark.parametrize("inputs, outputs", [(512, 48), (200, 24), (64, 16)])
def test_few_rows(
    poisoned: None, rng: torch.Generator, inputs: int, outputs: int, rows: int, dtype: torch.dtype
) -> None:
    """One tile of inputs, a partial one and fewer than warps; outputs that end in a program."""
    x, weight, bias = (made(rng, *s, dtype=dtype) for s in ((rows, inputs), (outputs, inputs), (outputs,)))
    got = ops.prepare_linear(weight, bias)(x[None])[0]
    as_good_as_torch(got, F.linear(x, weight, bias), F.linear(x.double(), weight.double(), bias.double()))


def test_partial_sums_and_rows_of_their_own(poisoned: None, rng: torch.Generator) -> None:
    """Splits are the weight's, and a row's sums are its own; of whole numbers, which numpy adds exactly."""
    x, weight, bias = made(rng, 16, 64 * 96).round(), made(rng, 40, 64 * 96).round(), made(rng, 40)
    linear = ops.prepare_linear(weight, bias)
    together = linear.forward_partial_sums(x)
    assert together.shape == (3, 16, 40) and together.dtype == torch.float32
    want = F.linear(x.double(), weight.double(), bias.double())
    as_good_as_torch(ops.sum_partials(together, x.dtype), F.linear(x, weight, bias), want)
    for rows in (1, 9):
        assert torch.equal(linear.forward_partial_sums(x[:rows]), together[:, :rows])


@pytest.mark.parametrize("outputs", [64, 40])
def test_swiglu_on_the_way_out(poisoned: None, rng: torch.Generator, outputs: int) -> None:
    x, weight = made(rng, 3, 128), made(rng, outputs, 128)
    linear = ops.prepare_linear(weight, made(rng, outputs))
    assert linear.gated is not None
    assert torch.equal(linear.gated(x), ops.swiglu(linear(x)))
    many = made(rng, 17, 128)
    assert torch.equal(linear.gated(many), ops.swiglu(linear(many)))


def test_what_the_kernel_does_not_take_is_torchs(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(dense, "dense_small_m_kernel")
    for weight in (made(rng, 8, 20), made(rng, 8, 64, dtype=torch.float32), made(rng, 64, 8).t()):
        assert not dense.takes(weight)
        x = made(rng, 2, weight.shape[1], dtype=weight.dtype)
        assert torch.equal(ops.prepare_linear(weight)(x), reference.linear(x, weight))
    weight, many = made(rng, 8, 64), made(rng, configs.SMALL_M[16] + 1, 64)
    assert torch.equal(ops.prepare_linear(weight)(many), reference.linear(many, weight))


def test_what_does_not_fit_is_refused(rng: torch.Generator) -> None:
    weight = made(rng, 16, 64)
    with pytest.raises(ValueError, match=r"dense_small_m: x has 17 rows; expected 1 to 16"):
        dense.plan_dense(made(rng, 17, 64), weight)
    with pytest.raises(ValueError, match=r"a weight of 15 x 64; expected inputs in eights, and even outputs to gate"):
        dense.plan_dense(made(rng, 1, 64), weight[:15], gated=True)
    with pytest.raises(ValueError, match=r"bias is float16 \[8\]"):
        dense.plan_dense(made(rng, 1, 64), weight, made(rng, 8))
