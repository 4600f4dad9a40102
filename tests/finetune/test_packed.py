"""Q-LoRA's frozen linears: packed words give what their dense weights give, forward and backward, in every layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qvl_kernels import cpu, reference
from qvl_kernels.layouts import repack
from qvl_kernels.reference import Packed, gptq_dequantize
from qvl_runtime.finetune.int4_linear import PackedLinear
from qvl_runtime.formats.gptq import GPTQLinear, quantize_rtn

pytestmark = pytest.mark.unit


def linear(act_order: bool, bias: bool, sym: bool = True) -> GPTQLinear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 128, generator=generator)
    own = quantize_rtn(weight, 4, 32, sym, bias=torch.randn(96, generator=generator) if bias else None)
    if not act_order:
        return own
    order = torch.randperm(128, generator=generator)
    return replace(own, g_idx=(torch.arange(128, dtype=torch.int32) // 32)[order])


def packed_by(layout: str, own: GPTQLinear) -> Packed:
    pack = {"gptq": reference.pack_gptq, "cpu": cpu.pack_gptq, "gpu": repack.pack_gptq}[layout]
    return pack(own.qweight, own.qzeros, own.scales, own.g_idx, own.bits, own.zero_offset, own.bias)


def dense(own: GPTQLinear) -> Tensor:
    return gptq_dequantize(own.qweight, own.qzeros, own.scales, own.g_idx, own.bits, own.zero_offset)


LAYOUTS = ["gptq", "cpu"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act_order", [False, True], ids=["ordered", "act-order"])
def test_exact_in_float32_against_dense_weights(layout: str, act_order: bool) -> None:
    own = linear(act_order, bias=False)
    module = PackedLinear(packed_by(layout, own))
    generator = torch.Generator().manual_seed(1)
    results = []
    x = torch.randn(9, 128, generator=generator)
    grad = torch.randn(9, 96, generator=generator)
    for function in (module.forward, lambda x: x @ dense(own).contiguous().t()):
        leaf = x.clone().requires_grad_()
        y: Tensor = function(leaf)
        y.backward(grad)  # type: ignore[no-untyped-call]
        results.append((y.detach(), leaf.grad))
    for ours, wanted in zip(*results, strict=True):
        assert ours is not None and wanted is not None and torch.equal(ours, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("tile", [16, 32, 64, 1000])
def test_tiles_add_up(layout: str, sym: bool, tile: int) -> None:
    own = linear(act_order=True, bias=True, sym=sym)
    module = PackedLinear(packed_by(layout, own), tile)
    x = torch.randn(2, 3, 128, dtype=torch.float64, requires_grad=True)
    assert own.bias is not None
    wanted = x @ dense(own).double().t() + own.bias.double()
    torch.testing.assert_close(module(x), wanted)
    (ours,), (theirs,) = (torch.autograd.grad(y.square().sum(), x) for y in (module(x), wanted))
    torch.testing.assert_close(ours, theirs)


def test_nothing_is_saved_for_the_backward_pass() -> None:
    module = PackedLinear(packed_by("gptq", linear(act_order=True, bias=True)))
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(torch.randn(4, 128, requires_grad=True)).sum()
    assert not saved
    assert not list(module.parameters()) and not module.state_dict(), "the words are neither trained nor saved"


@pytest.mark.interpreter
@pytest.mark.parametrize("act_order", [False, True], ids=["ordered", "act-order"])
def test_the_gpu_layout_by_its_own_kernel(act_order: bool) -> None:
    pytest.importorskip("triton", reason="needs triton")
    own = linear(act_order, bias=True)
    module = PackedLinear(packed_by("gpu", own), 128)
    x = torch.randn(5, 128, requires_grad=True)
    assert own.bias is not None
    wanted = x @ dense(own).t() + own.bias.float()
    torch.testing.assert_close(module(x), wanted, rtol=2e-3, atol=2e-3)
    (ours,), (theirs,) = (torch.autograd.grad(y.sum(), x) for y in (module(x), wanted))
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
