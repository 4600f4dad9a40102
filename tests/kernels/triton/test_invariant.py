"""The ops of `batch_invariant`: the same bits for a row whatever the slices, chunks and neighbors of its step."""

from __future__ import annotations

import pytest
import torch

from qvl_kernels import triton
from qvl_kernels.ops import Ops
from qvl_kernels.reference import BoundLinear
from qvl_kernels.triton import invariant
from tests.kernels.gptq import checkpoint
from tests.kernels.triton.test_attention import case

pytestmark = pytest.mark.interpreter
ROWS, INPUTS, OUTPUTS = 37, 128, 64  # more rows than any kernel of few rows takes


def test_it_has_every_op() -> None:
    ops: Ops = invariant
    assert sorted(invariant.__all__) == sorted(triton.__all__) and ops.LAYOUTS == triton.LAYOUTS


def linear(kind: str, rng: torch.Generator, ops: Ops) -> BoundLinear:
    if kind == "dense":
        weight = torch.randn(OUTPUTS, INPUTS, generator=rng).half() / 16
        return ops.prepare_linear(weight, torch.randn(OUTPUTS, generator=rng).half())
    bits = int(kind.removeprefix("int"))
    return ops.prepare_gptq(*checkpoint(INPUTS, OUTPUTS, 64, bits=bits), bits, 1)


@pytest.mark.parametrize("kind", ["dense", "int4", "int8"])
def test_rows_are_multiplied_in_slices(rng: torch.Generator, kind: str) -> None:
    bound = linear(kind, rng, invariant)
    x = torch.randn(ROWS, INPUTS, generator=rng).half()
    whole = bound(x)
    assert whole.shape == (ROWS, OUTPUTS) and bound.split_k is None and bound.gated is None
    assert torch.equal(bound.forward_partial_sums(x), whole)
    for cuts in ([20, 17], [1, 35, 1], [9, 9, 9, 10]):
        assert torch.equal(torch.cat([bound(rows) for rows in torch.split(x, cuts)]), whole), cuts
    images = bound(x[:36].view(2, 18, INPUTS))
    assert images.shape == (2, 18, OUTPUTS) and torch.allclose(images.flatten(0, 1), whole[:36], atol=1e-2)


@pytest.mark.parametrize("cache_dtype", [None, torch.int8], ids=["16 bits", "int8"])
def test_tokens_of_a_prompt_attend_as_decoded_ones(rng: torch.Generator, cache_dtype: torch.dtype | None) -> None:
    """A prompt of 40 tokens, whole, in two chunks of which the second meets another request, and token by token."""
    c = case(rng, [40, 1], [40, 33], cache_dtype=cache_dtype)
    prompt, other = c.q[:40], c.q[40:]
    cached = c.k_cache, c.v_cache
    whole = invariant.paged_attention(prompt, *cached, c.block_tables[:1], [0, 40], [40])
    first = invariant.paged_attention(prompt[:23], *cached, c.block_tables[:1], [0, 23], [23])
    mixed = torch.cat([prompt[23:], other])
    second = invariant.paged_attention(mixed, *cached, c.block_tables, [0, 17, 18], [40, 33])
    assert torch.equal(torch.cat([first, second[:17]]), whole)
    last = invariant.paged_attention(prompt[39:], *cached, c.block_tables[:1], [0, 1], [40])
    assert torch.equal(last[0], whole[39])
    usual = triton.paged_attention(prompt, *cached, c.block_tables[:1], [0, 40], [40])
    assert torch.allclose(usual.float(), whole.float(), atol=2e-2) and not torch.equal(usual, whole)
