"""Sampling in Triton's interpreter gives the tokens that the scheduler's sampler gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qvl_kernels.triton.sampling.sample import SamplingRows, sample  # type: ignore[attr-defined]
from qvl_runtime.schedule.api import SamplingParams
from qvl_runtime.schedule.sampler import sample as sample_on_cpu
from qvl_runtime.schedule.sampling_state import SamplingRow, SamplingState

pytestmark = pytest.mark.interpreter
DEVICE = torch.device("cpu")


def params(**changes: Any) -> SamplingParams:
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "seed": 5}
    return SamplingParams(**(plain | changes))


def device_rows(rows: list[SamplingRow], vocab: int) -> SamplingRows:
    """What a runner keeps on the device for these rows, each answer in the slot of its place, from the last on."""
    m, own = len(rows), [row.state.params for row in rows]
    slots = torch.arange(m - 1, -1, -1)
    seen, bias = torch.zeros(m, vocab, dtype=torch.bool), torch.zeros(m, vocab)
    for slot, row in zip(slots.tolist(), rows, strict=True):
        if row.state.seen is not None:
            seen[slot] = row.state.seen
        if row.state.bias is not None:
            bias[slot] = row.state.bias
    return SamplingRows(
        temperature=torch.tensor([p.temperature for p in own]),
        top_k=torch.tensor([p.top_k for p in own], dtype=torch.int32),
        top_p=torch.tensor([p.top_p for p in own]),
        min_p=torch.tensor([p.min_p for p in own]),
        uniform=torch.tensor([row.state.uniform(row.position) for row in rows], dtype=torch.float64),
        penalty=torch.tensor([row.state.penalty for row in rows]),
        slots=slots,
        seen=seen,
        bias=bias,
    )


MANY = [
    params(temperature=0.0),
    params(),
    params(temperature=0.3, top_p=0.3),
    params(temperature=2.0, top_k=1),
    params(temperature=1.5, top_k=50),
    params(temperature=1.5, top_k=50, top_p=0.5),
    params(top_p=0.9, min_p=0.05),
    params(temperature=3.0, min_p=0.2),
    params(temperature=1e-6),
    params(top_p=1e-6),
    params(temperature=0.0, repetition_penalty=1.5, logit_bias={3: 40.0}),
    params(repetition_penalty=1.3, top_p=0.8, logit_bias={5: 3.0, 7: -100.0}),
    params(top_k=10**6, top_p=0.999),
]


@pytest.mark.parametrize(("vocab", "seed"), [(17, 0), (2050, 1), (5000, 2)])
def test_the_tokens_are_those_of_the_sampler(poisoned: None, rng: torch.Generator, vocab: int, seed: int) -> None:
    logits = torch.randn(len(MANY), vocab, generator=rng) * 4
    rows = [
        SamplingRow(SamplingState(p, [1, 2, 9], vocab, DEVICE, index=seed * 1000 + i), i) for i, p in enumerate(MANY)
    ]
    state = device_rows(rows, vocab)
    got = sample(logits, state)
    want = sample_on_cpu(logits, rows)  # marks what it chooses, so it comes second
    assert got.token_ids.tolist() == [s.token_id for s in want]
    torch.testing.assert_close(got.logprobs, torch.tensor([s.logprob.logprob for s in want]), rtol=1e-6, atol=1e-5)
    assert state.seen is not None and state.slots is not None
    for row, slot in zip(rows, state.slots.tolist(), strict=True):
        if row.state.seen is not None:
            assert torch.equal(state.seen[slot], row.state.seen)


def test_many_throws_fall_as_the_probabilities_say(poisoned: None, rng: torch.Generator) -> None:
    """Every token of a small vocabulary at its own share of evenly spaced uniform, ties in the order of their ids."""
    probs = torch.tensor([0.1, 0.2, 0.2, 0.2, 0.05, 0.25])

    def thrown(n: int, top_k: int = 0, top_p: float = 1.0) -> list[int]:
        ones, uniform = torch.ones(n), (torch.arange(n, dtype=torch.float64) + 0.5) / n
        rows = SamplingRows(ones, torch.full((n,), top_k, dtype=torch.int32), ones * top_p, ones * 0, uniform)
        tokens: list[int] = sample(probs.log().repeat(n, 1), rows).token_ids.tolist()
        return tokens

    assert thrown(20) == [5] * 5 + [1] * 4 + [2] * 4 + [3] * 4 + [0] * 2 + [4]
    assert thrown(13, top_k=3) == [5] * 5 + [1] * 4 + [2] * 4  # of the three equal ones, two
    assert thrown(9, top_p=0.4) == [5] * 5 + [1] * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_likeliest_is_the_first_of_equals(poisoned: None, dtype: torch.dtype) -> None:
    logits = torch.zeros(3, 4100, dtype=dtype)
    logits[0, [7, 4099]] = 2.0
    logits[1, 4099] = 1.0
    got = sample(logits, None)
    assert got.token_ids.tolist() == [7, 4099, 0]
    want = logits.float().log_softmax(-1).gather(1, got.token_ids[:, None])[:, 0]
    torch.testing.assert_close(got.logprobs, want, rtol=1e-6, atol=1e-5)


def test_an_answer_without_a_slot_is_neither_punished_nor_marked(poisoned: None, rng: torch.Generator) -> None:
    vocab = 40
    draws = SamplingState(params(temperature=0.0, repetition_penalty=9.0), range(vocab), vocab, DEVICE)
    rows = device_rows([SamplingRow(draws, 0)], vocab)
    logits = torch.randn(1, vocab, generator=rng)
    assert rows.seen is not None
    rows.seen.zero_()
    token = sample(logits, rows._replace(slots=torch.tensor([-1]))).token_ids
    assert token == logits.argmax() and not rows.seen.any()


def test_what_does_not_fit_is_refused(rng: torch.Generator) -> None:
    rows = device_rows([SamplingRow(SamplingState(params(), [], 8, DEVICE), 0)], 8)
    with pytest.raises(ValueError, match=r"uniform is float32 \[1\]; expected contiguous float64 \[1\]"):
        sample(torch.zeros(1, 8), rows._replace(uniform=torch.zeros(1)))
    with pytest.raises(ValueError, match="one of penalty and seen is None"):
        sample(torch.zeros(1, 8), rows._replace(seen=None))
    with pytest.raises(ValueError, match="slots is None"):
        sample(torch.zeros(1, 8), rows._replace(slots=None))
