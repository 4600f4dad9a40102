"""A row of logits without a distribution gives an error, in every implementation, and its neighbors their tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from qvl_kernels import cpu, reference
from qvl_kernels.cpu.library import instruction_set, library
from qvl_runtime.schedule.api import SamplingParams
from qvl_runtime.schedule.sampler import Sample, sample
from qvl_runtime.schedule.sampling_state import SamplingRow, SamplingState

pytestmark = pytest.mark.unit
VOCAB = 97
SETS = library().available
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def implementation(name: str) -> ModuleType:
    if name == "triton":
        if find_spec("triton") is None:
            pytest.skip("triton is not installed: make setup")
        from qvl_kernels import triton

        return triton
    return {"reference": reference, "cpu": cpu}[name]


def params(**given: Any) -> SamplingParams:
    plain: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "seed": 11}
    return SamplingParams(**plain | given)


GREEDY = params()
DRAWN = params(temperature=0.8, top_p=0.9)
CUT = params(temperature=1.2, top_k=5, min_p=0.01)
PENALIZED = params(temperature=0.7, repetition_penalty=1.3, logit_bias={4: 2.0})
PLAIN = [GREEDY, DRAWN, CUT, PENALIZED]
FORBIDDEN = dict.fromkeys(range(1, VOCAB), -math.inf)


def sampled(logits: Tensor, given: list[SamplingParams], ops: ModuleType) -> list[Sample]:
    device = torch.device("cpu")
    rows = [SamplingRow(SamplingState(p, (3, 5), logits.shape[1], device), 0) for p in given]
    return sample(logits, rows, ops)


def damaged(value: float, at: int | slice, dtype: torch.dtype, rows: int) -> Tensor:
    """Random logits; every second row has `value` at these tokens."""
    logits = 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[1::2, at] = value
    return logits


@pytest.mark.parametrize(
    ("name", "mixed", "dtype"),
    [
        *((name, mixed, dtype) for name in ("reference", "cpu") for mixed in (False, True) for dtype in FLOATS),
        ("triton", False, torch.float16),
        ("triton", True, torch.bfloat16),  # slow: seconds for two rows
    ],
)
@pytest.mark.parametrize(
    ("value", "at"),
    [
        (math.nan, slice(None)),  # Qwen3#269: "!!!!!!"
        (math.nan, 0),
        (math.nan, 96),
        (math.inf, 41),  # Qwen3#381: "probability tensor contains inf or nan"
        (math.inf, slice(None)),
        (-math.inf, slice(None)),
    ],
    ids=["NaN", "first NaN", "last NaN", "one infinite", "all infinite", "all -infinite"],
)
def test_logits_that_are_not_finite(name: str, mixed: bool, dtype: torch.dtype, value: float, at: Any) -> None:
    ops = implementation(name)
    kinds = PLAIN[3:] if name == "triton" else PLAIN
    given = [p for p in kinds for _ in range(2)] if mixed else [GREEDY] * 4
    logits = damaged(value, at, dtype, len(given))
    found = sampled(logits, given, ops)
    healthy = sampled(logits[::2].contiguous(), given[::2], ops)
    assert [one.error is not None for one in found] == [False, True] * (len(given) // 2)
    for one, alone in zip(found[::2], healthy, strict=True):
        assert one.token_id == alone.token_id and math.isfinite(one.logprob.logprob)
    message = str(found[1].error)
    assert ("NaN" if math.isnan(value) else "infinite") in message
    assert ("float16's 65,504" in message) == (dtype is torch.float16)
    assert "damaged weight" in message


@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
def test_some_tokens_without_probability_are_no_fault(name: str) -> None:
    """-inf for some tokens, whole chunks of the kernels included, leaves a distribution of the others."""
    logits = torch.full((4, 5000), -math.inf)
    logits[:, 4321] = 1.0
    logits[:, 4999] = 0.5
    for given in ([GREEDY] * 4, PLAIN):
        for one in sampled(logits, given, implementation(name)):
            assert one.error is None
            assert one.logprob.logprob == pytest.approx(logits[0].log_softmax(-1)[one.token_id].item(), abs=1e-5)
            assert one.token_id in (4321, 4999)


@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_rule_out_every_token(name: str, temperature: float) -> None:
    ops = implementation(name)
    logits = damaged(0.0, 0, torch.float32, 5)
    given = [
        params(temperature=temperature),
        params(temperature=temperature, logit_bias=FORBIDDEN),
        params(temperature=temperature, logit_bias={0: -math.inf} | {t: b for t, b in FORBIDDEN.items() if t != 7}),
        params(temperature=temperature, repetition_penalty=1.2e-38, logit_bias={3: 3e38}),
        params(temperature=temperature, repetition_penalty=1.0001),
    ]
    logits[1, 0] = -math.inf  # the only one that is not forbidden
    logits[3, 3] = 5.0  # over 1.2e-38: beyond float32
    plain, forbidden, one_left, overflow, penalized = sampled(logits, given, ops)
    assert plain.error is None and penalized.error is None
    assert one_left.error is None and one_left.token_id == 7
    assert "logit_bias forbids every token of 97" in str(forbidden.error)
    assert "repetition_penalty 1.2e-38" in str(overflow.error)


@pytest.mark.parametrize("garbage", [0, 7, 96, 2**31 - 1])
def test_what_memory_held_before_is_no_token(garbage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row without candidates once drew from uninitialized memory, and got a token where that held one."""
    ops = implementation("triton")
    empty = torch.Tensor.new_empty

    def filled(self: Tensor, *shape: Any, **options: Any) -> Tensor:
        return empty(self, *shape, **options).fill_(garbage)

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)
    logits = torch.zeros(2, VOCAB)
    logits[1, 0] = -math.inf
    fine, forbidden = sampled(logits, [DRAWN, params(temperature=1.0, logit_bias=FORBIDDEN)], ops)
    assert fine.error is None
    assert "logit_bias forbids every token of 97" in str(forbidden.error)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("width", [1, 5, 16, 17, 1024, 1152, 4099])
def test_every_instruction_set_tells(isa: str, width: int) -> None:
    logits = torch.randn(5, width, generator=torch.Generator().manual_seed(width))
    logits[1, width // 2], logits[2, width - 1], logits[3] = math.nan, math.inf, -math.inf
    for dtype in FLOATS:
        with instruction_set(isa):
            found = cpu.greedy(logits.to(dtype))
        assert found.logprobs.isnan().tolist() == [False, True, True, True, False]
        assert ((found.token_ids >= 0) & (found.token_ids < width)).all()


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rounding_to_int8_keeps_what_is_not_finite(isa: str, value: float) -> None:
    """Activations, weights and cached vectors that are rounded to int8 must not become numbers."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(32, 256, generator=generator), torch.randn(3, 256, generator=generator)
    damaged_x, damaged_weight = x.clone(), weight.clone()
    damaged_x[1, 77] = damaged_weight[5, 200] = value
    with instruction_set(isa):
        rows = cpu.prepare_linear(weight, None, "fast")(damaged_x).isfinite()
        columns = cpu.prepare_linear(damaged_weight, None, "fast")(x).isfinite()
    assert rows[[0, 2]].all() and not rows[1].any()
    assert not columns[:, 5].any() and columns[:, [*range(5), *range(6, 32)]].all()


@contextmanager
def ops_of(name: str) -> Iterator[ModuleType]:
    with instruction_set(name) if name in SETS else nullcontext():
        yield implementation("cpu" if name in SETS else name)


def cached(ops: ModuleType, dtype: torch.dtype, value: float = math.nan) -> tuple[Tensor, Tensor]:
    """Empty caches of three blocks, and one of `value`."""
    width = ops.cache_width(DIM, dtype)
    k, v = (torch.full((4, HEADS, 16, width), value if dtype.is_floating_point else -1, dtype=dtype) for _ in range(2))
    return k, v


HEADS, DIM = 2, 64
EVERYWHERE = pytest.mark.parametrize("name", [*SETS, "reference", "triton"])


@EVERYWHERE
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_attention_keeps_what_is_not_finite_to_its_request(name: str, dtype: torch.dtype, rows: int) -> None:
    """Of four requests of some tokens the key of one is damaged, the value of another, the query of a third."""
    qkv = torch.randn(4, rows, 3, HEADS, DIM, generator=torch.Generator().manual_seed(0))
    qkv[0, :, 1, 0, 9] = qkv[1, -1, 2, 1, 40] = qkv[2, :, 0, 0, 3] = math.nan
    with ops_of(name) as ops:
        k, v = cached(ops, dtype)
        flat = qkv.flatten(0, 1).flatten(1)
        slots = (torch.arange(4)[:, None] * 16 + torch.arange(rows)).flatten()
        cos, sin, logn = torch.ones(4 * rows, DIM), torch.zeros(4 * rows, DIM), torch.ones(4 * rows)
        q = ops.rotary_to_cache(flat, cos, sin, logn, k, v, slots)
        starts = [i * rows for i in range(5)]
        y = ops.paged_attention(q, k, v, torch.arange(4)[:, None], starts, [rows] * 4).view(4, rows, HEADS, DIM)
    assert y[0, :, 0].isnan().all() and y[0, :, 1].isfinite().all()
    assert y[1, -1, 1].isnan().any() and y[1, :, 0].isfinite().all()
    assert y[2, :, 0].isnan().all() and y[2, :, 1].isfinite().all()
    assert y[3].isfinite().all(), "the unwritten slots of the block, which are NaN, are not read"


@EVERYWHERE
def test_vision_attention_keeps_what_is_not_finite_to_its_image(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv, queries = torch.randn(3, 9, 3 * HEADS * DIM, generator=generator), torch.randn(20, HEADS * DIM)
    qkv.view(3, 9, HEADS, 3, DIM)[1, :, :, 1, 5] = math.nan  # every key
    keys, values = torch.randn(2, 3, 9, HEADS * DIM, generator=generator)
    keys[1] = math.nan
    with ops_of(name) as ops:
        patches = ops.vision_attention(qkv, HEADS)
        pooled = ops.cross_attention(queries, keys.contiguous(), values.contiguous(), HEADS)
    for y in (patches, pooled):
        assert y[1].isnan().all() and y[[0, 2]].isfinite().all()
