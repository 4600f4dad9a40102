"""The solver against the paper's own form of GPTQ, and with unusable statistics."""

from __future__ import annotations

import logging
from itertools import product

import pytest
import torch
from torch import Tensor

from qvl_kernels.reference import gptq_dequantize, unpack_rows
from qvl_runtime.config.quantization import QuantizationConfig
from qvl_runtime.errors import CheckpointError
from qvl_runtime.formats.gptq import GPTQLinear, quantize_rtn
from qvl_runtime.formats.grid import closest_grid, grid_between
from qvl_runtime.quantize.solver import SHRINKS, Solver

pytestmark = pytest.mark.unit
OUTPUTS = 64
WHOLE = (1.0,)  # grids as the paper has them


def inputs(rows: int, width: int) -> Tensor:
    """Correlated channels of different size with a mean, like activations."""
    generator = torch.Generator().manual_seed(width)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    size = torch.rand(width, generator=generator) * 2 + 0.1
    return (torch.randn(rows, width, generator=generator) @ mix + 0.3) * size  # type: ignore[no-any-return]


def weights(width: int) -> Tensor:
    return torch.randn(OUTPUTS, width, generator=torch.Generator().manual_seed(1)) * 0.05


def dense(linear: GPTQLinear) -> Tensor:
    return gptq_dequantize(linear.qweight, linear.qzeros, linear.scales, linear.g_idx, linear.bits, linear.zero_offset)


def paper(weight: Tensor, x: Tensor, q: QuantizationConfig, damping: float) -> Tensor:
    """Algorithm 1 of the paper with one column per block: codes [in, out]. Grids from the weights at that step."""
    w, width = weight.double().clone(), weight.shape[1]
    hessian = x.double().t() @ x.double()
    hessian += damping * hessian.diagonal().mean() * torch.eye(width)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    size = width if q.group_size == -1 else q.group_size
    codes = torch.empty(width, len(w))
    for i in range(width):
        if i % size == 0:
            group = w[:, i : i + size].float()
            grid = grid_between(group.amin(1), group.amax(1), q.bits, q.sym, q.zero_offset)
        codes[i] = grid.quantize(w[:, i].float())
        error = (w[:, i] - grid.dequantize(codes[i])) / upper[i, i]
        w[:, i:] -= error[:, None] * upper[i, i:]
    return codes


@pytest.mark.parametrize(("bits", "group", "sym"), [*product((4, 8), (32, 64, -1), (True, False))])
def test_solver_gives_the_papers_codes(bits: int, group: int, sym: bool) -> None:
    q, x, weight = QuantizationConfig(bits, group, sym=sym), inputs(400, 96), weights(96)  # 96: one group and a half
    solver = Solver(q, order="none", shrinks=WHOLE)
    found = solver.solve(weight, solver.factor(x))
    assert torch.equal(unpack_rows(found.qweight, bits).float(), paper(weight, x, q, 0.01))


def test_full_order_is_the_paper_on_inputs_sorted_by_their_size() -> None:
    q, x, weight = QuantizationConfig(4, 32, desc_act=True), inputs(400, 96), weights(96)
    solver = Solver(q, order="full", shrinks=WHOLE)
    found = solver.solve(weight, solver.factor(x))
    order = torch.argsort(x.square().sum(0), descending=True)
    codes = unpack_rows(found.qweight, 4)[order].float()
    assert torch.equal(codes, paper(weight[:, order], x[:, order], q, 0.01))
    assert found.g_idx is not None
    assert torch.equal(found.g_idx[order], torch.arange(96, dtype=torch.int32) // 32)


def drifted(x: Tensor) -> Tensor:
    """Inputs x as a float model would have them, if earlier rounding had mixed them a little and added noise."""
    generator, width = torch.Generator().manual_seed(3), x.shape[1]
    mixed = x @ torch.randn(width, width, generator=generator) / width**0.5
    return x + 0.05 * mixed + 0.02 * torch.randn(x.shape, generator=generator)  # type: ignore[no-any-return]


def toward(weight: Tensor, x: Tensor, float_x: Tensor, share: float, damping: float) -> Tensor:
    """The weight whose outputs on x [n, in] are closest to those of `weight` on `float_x`; a share of the way there."""
    x, float_x, w = x.double(), float_x.double(), weight.double()
    hessian = x.t() @ x
    hessian += damping * hessian.diagonal().mean() * torch.eye(x.shape[1])
    return w + share * torch.linalg.solve(hessian, x.t() @ (float_x - x) @ w.t()).t()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("order", "share"), [*product(("none", "full"), (0.5, 1.0))])
def test_drift_is_the_paper_on_the_weight_that_compensates_it(order: str, share: float) -> None:
    q, x, weight = QuantizationConfig(4, 32, desc_act=order == "full"), inputs(400, 96), weights(96)
    solver = Solver(q, order=order, drift=share, shrinks=WHOLE)
    found = solver.solve(weight, solver.factor(x, drifted(x)))
    by_size = torch.argsort(x.square().sum(0), descending=True) if order == "full" else torch.arange(96)
    wished = toward(weight, x, drifted(x), share, 0.01)
    codes = unpack_rows(found.qweight, 4)[by_size].float()
    assert torch.equal(codes, paper(wished[:, by_size], x[:, by_size], q, 0.01))
    plain = solver.solve(weight, solver.factor(x))
    assert not torch.equal(found.qweight, plain.qweight)


@pytest.mark.parametrize("order", ["none", "static", "full"])
def test_outputs_are_closer_to_the_float_models_with_drift(order: str) -> None:
    x, held_out = inputs(2000, 192).split(1000)  # type: ignore[no-untyped-call]
    weight, solver = weights(192), Solver(QuantizationConfig(4, 64), order=order)
    float_x = drifted(torch.cat([x, held_out]))
    wanted = float_x[1000:] @ weight.t()
    errors = [
        float((wanted - held_out @ dense(solver.solve(weight, factor)).t()).norm())
        for factor in (solver.factor(x, float_x[:1000]), solver.factor(x))
    ]
    assert errors[0] < 0.9 * errors[1]


def test_without_drift_nothing_changes() -> None:
    x, weight, solver = inputs(400, 64), weights(64), Solver(QuantizationConfig(4, 32))
    found, plain = (solver.solve(weight, solver.factor(x, float_x)) for float_x in (x.clone(), None))
    assert torch.equal(found.qweight, plain.qweight) and torch.equal(found.scales, plain.scales)


@pytest.mark.parametrize(
    ("bits", "group", "sym", "order"),
    [*product((4, 8), (32, 128, -1), (True, False), ("none", "static", "full"))],
)
def test_outputs_are_closer_than_rounding_to_nearest(bits: int, group: int, sym: bool, order: str) -> None:
    x, held_out = inputs(2000, 192).split(1000)  # type: ignore[no-untyped-call]  # 192: a group of 128 and half of one
    weight, q = weights(192), QuantizationConfig(bits, group, desc_act=order == "full", sym=sym)
    solver = Solver(q, order=order)
    found = solver.solve(weight, solver.factor(x))
    assert found.g_idx is None or order == "full" or 192 % group
    errors = [
        float((held_out @ (weight - dense(linear)).t()).norm())
        for linear in (found, quantize_rtn(weight, bits, group, sym))
    ]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize(("bits", "sym"), [*product((4, 8), (True, False))])
def test_a_grid_is_the_closest_of_those_tried(bits: int, sym: bool) -> None:
    rows = torch.randn(128, OUTPUTS, generator=torch.Generator().manual_seed(2)) + 0.2
    tried = []
    for shrink in SHRINKS:
        grid = grid_between(shrink * rows.amin(0), shrink * rows.amax(0), bits, sym, 1)
        tried.append((rows - grid.dequantize(grid.quantize(rows))).square().sum(0))
    found = closest_grid(rows, SHRINKS, bits, sym, 1)
    error = (rows - found.dequantize(found.quantize(rows))).square().sum(0)
    assert torch.equal(error, torch.stack(tried).amin(0))
    assert (error.mean() < 0.95 * tried[0].mean()) == (bits == 4), "8 bits have codes to spare for the whole range"


def test_without_correlation_it_is_rounding_to_nearest() -> None:
    weight, q = weights(64), QuantizationConfig(4, 32)
    solver = Solver(q, order="static", shrinks=WHOLE)
    found, nearest = solver.solve(weight, solver.factor(torch.eye(64))), quantize_rtn(weight, 4, 32, True)
    assert torch.equal(found.qweight, nearest.qweight) and torch.equal(found.scales, nearest.scales)


def test_an_input_that_is_never_used_is_rounded_to_nearest() -> None:
    x, weight, q = inputs(200, 64), weights(64), QuantizationConfig(4, -1)
    x[:, 5] = 0
    solver = Solver(q, order="none", shrinks=WHOLE)
    found, nearest = solver.solve(weight, solver.factor(x)), quantize_rtn(weight, 4, -1, True)
    assert torch.equal(unpack_rows(found.qweight, 4)[5], unpack_rows(nearest.qweight, 4)[5])


def test_fewer_rows_than_inputs_are_enough() -> None:
    x, weight = inputs(10, 64), weights(64)
    solver = Solver(QuantizationConfig(4, 32))
    assert torch.isfinite(dense(solver.solve(weight, solver.factor(x)))).all()


def test_damping_grows_where_statistics_are_singular_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.ones(50, 64)  # rank one: float32 has no room for a damping of 1e-12
    with caplog.at_level(logging.WARNING):
        factor = Solver(QuantizationConfig(4, 32), damping=1e-12).factor(x)
    assert factor.damping > 1e-12 and "singular" in caplog.text


def test_what_is_not_finite_is_refused() -> None:
    solver = Solver(QuantizationConfig(4, 32))
    with pytest.raises(CheckpointError, match="finite activations"):
        solver.factor(torch.full((8, 64), float("nan")))
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        solver.solve(torch.full((32, 64), float("inf")), solver.factor(inputs(100, 64)))


def test_statistics_of_bfloat16_are_exact_to_float32_sums() -> None:
    x = inputs(5000, 64).bfloat16()  # more than one chunk of rows
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    factor = Solver(QuantizationConfig(4, 32), damping=1e-3, order="none").factor(x)
    assert torch.backends.mkldnn.matmul.fp32_precision == before  # type: ignore[attr-defined]
    exact = x.double().t() @ x.double()
    exact += 1e-3 * exact.diagonal().mean() * torch.eye(64)
    bound = len(x) * torch.finfo(torch.float32).eps * (x.double().abs().t() @ x.double().abs())
    assert ((factor.upper.double() @ factor.upper.double().t() - exact).abs() <= bound).all()
