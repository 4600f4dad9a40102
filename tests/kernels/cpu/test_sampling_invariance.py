"""A row's token and log probability do not depend on how the other rows of a step are sampled, bit by bit."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from qvl_kernels import cpu
from qvl_kernels.reference.sampling import SamplingRows
from tests.kernels.cpu.test_invariance import DTYPES, same_bits

pytestmark = pytest.mark.unit

# temperature, top_k, top_p, min_p: greedy ones among others, and cuts that search all tokens
KINDS = [
    (0, 0, 1, 0),
    (1, 0, 1, 0),
    (0.7, 5, 0.9, 0),
    (3, 0, 0.99, 0),
    (1, 2000, 0.95, 0),
    (0, 0, 1, 0),
    (9, 0, 1, 1e-5),
]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch splits the sum of one row of more than 32,768 among its threads, and not those of several."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [300, 70_001])
def test_sample(isa: str, rng: torch.Generator, threads: None, dtype: torch.dtype, vocab: int) -> None:
    logits = (torch.randn(len(KINDS), vocab, generator=rng) * 3).to(dtype)
    temperature, top_k, top_p, min_p = torch.tensor(KINDS).t()
    uniform = torch.rand(len(KINDS), generator=rng, dtype=torch.float64)
    rows = SamplingRows(temperature, top_k.int(), top_p, min_p, uniform)
    together, plain = cpu.sample(logits, rows), cpu.greedy(logits)
    for i, (warmth, *_) in enumerate(KINDS):
        alone = cpu.sample(logits[i : i + 1], SamplingRows(*(column[i : i + 1] for column in rows[:5])))
        assert torch.equal(alone.token_ids, together.token_ids[i : i + 1])
        assert same_bits(alone.logprobs, together.logprobs[i : i + 1])
        if not warmth:
            assert torch.equal(plain.token_ids[i], together.token_ids[i])
            assert same_bits(plain.logprobs[i], together.logprobs[i])


def test_what_has_no_distribution(isa: str) -> None:
    """NaN, +inf and only -inf, by either op; -inf alone rules out one token."""
    logits = torch.zeros(4, 40)
    logits[0, 3], logits[1, 3], logits[2], logits[3, 3] = math.nan, math.inf, -math.inf, -math.inf
    rows = SamplingRows(
        torch.ones(4), torch.zeros(4).int(), torch.ones(4), torch.zeros(4), torch.full((4,), 0.5).double()
    )
    for sampled in (cpu.greedy(logits), cpu.sample(logits, rows)):
        assert sampled.logprobs.isnan().tolist() == [True, True, True, False]
