"""The choice of a token: each rule by itself against its definition, and their order."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qvl_runtime.config import GenerationDefaults
from qvl_runtime.errors import SamplingError
from qvl_runtime.schedule.request import SamplingParams
from qvl_runtime.schedule.sampler import Sampler, filtered

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")
PLAIN = GenerationDefaults(do_sample=False)
LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0])


def sampler(params: SamplingParams, prompt: tuple[int, ...] = (), vocab: int = 5) -> Sampler:
    return Sampler(params.resolve(PLAIN), prompt, vocab, CPU)


def kept(scores: Tensor) -> list[int]:
    return [i for i, s in enumerate(scores.tolist()) if s > -math.inf]


def test_greedy_takes_the_likeliest_and_tells_its_probability() -> None:
    sample = sampler(SamplingParams(logprobs=2))(LOGITS)
    assert sample.token_id == 0
    want = LOGITS.log_softmax(-1)
    assert sample.logprob.logprob == pytest.approx(want[0].item())
    assert [i for i, _ in sample.logprob.top] == [0, 1]
    assert [p for _, p in sample.logprob.top] == pytest.approx(want[:2].tolist())


@pytest.mark.parametrize(
    ("params", "survivors"),
    [
        (SamplingParams(top_k=2), [0, 1]),
        (SamplingParams(top_k=0), [0, 1, 2, 3, 4]),
        (SamplingParams(top_k=9), [0, 1, 2, 3, 4]),
        (SamplingParams(top_p=0.01), [0]),  # the likeliest always stays
        (SamplingParams(top_p=0.62), [0, 1]),  # 0.607 < 0.62: the token that reaches p is kept
        (SamplingParams(top_p=1.0), [0, 1, 2, 3, 4]),
        (SamplingParams(min_p=0.2), [0, 1, 2]),  # e^-1 = 0.37 and e^-1.5 = 0.22 of the likeliest, then e^-3
        (SamplingParams(top_k=3, top_p=0.62), [0]),  # top-p counts what top-k left: 0.629 of three
    ],
)
def test_cuts(params: SamplingParams, survivors: list[int]) -> None:
    assert kept(filtered(LOGITS, params)) == survivors


def test_draws_follow_the_distribution() -> None:
    draw = sampler(SamplingParams(temperature=0.7, seed=1))
    n = 4000
    counts = torch.bincount(torch.tensor([draw(LOGITS).token_id for _ in range(n)]), minlength=5) / n
    want = (LOGITS / 0.7).softmax(-1)
    assert ((counts - want).abs() < 4 * (want * (1 - want) / n).sqrt() + 1e-9).all()  # four standard errors


def test_a_seed_repeats_and_nothing_else_moves_it() -> None:
    first = [draw(LOGITS).token_id for draw in [sampler(SamplingParams(temperature=1.0, seed=7))] for _ in range(20)]
    again = sampler(SamplingParams(temperature=1.0, seed=7))
    second = []
    for _ in range(20):
        torch.rand(3)  # somebody else draws in between
        second.append(again(LOGITS).token_id)
    other = [draw(LOGITS).token_id for draw in [sampler(SamplingParams(temperature=1.0, seed=8))] for _ in range(20)]
    assert first == second != other


def test_repetition_penalty_counts_the_prompt_and_the_answer() -> None:
    draw = sampler(SamplingParams(repetition_penalty=3.0), prompt=(0,))
    assert draw(LOGITS).token_id == 1  # 2 / 3 < 1
    assert draw(LOGITS).token_id == 0  # 1 / 3 < 2 / 3, and 0.5 < 2 / 3
    negative = torch.tensor([-1.0, -1.5, -9.0, -9.0, -9.0])
    assert sampler(SamplingParams(repetition_penalty=2.0), prompt=(0,))(negative).token_id == 1  # -1 becomes -2


def test_logit_bias_moves_the_choice_but_not_the_logprob() -> None:
    sample = sampler(SamplingParams(logit_bias={4: 100.0}, logprobs=0))(LOGITS)
    assert sample.token_id == 4
    assert sample.logprob.logprob == pytest.approx(LOGITS.log_softmax(-1)[4].item())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0), ("temperature", -1.0), ("temperature", math.nan), ("temperature", math.inf), ("top_p", 0.0),
        ("top_p", 1.1), ("top_k", -1), ("min_p", 2.0), ("repetition_penalty", 0.0), ("seed", -1), ("n", 0),
        ("logprobs", -1), ("stop", ("",)),
    ],
)  # fmt: skip
def test_out_of_range(field: str, value: object) -> None:
    with pytest.raises(SamplingError, match=rf"^{field} is .*; expected ") as error:
        SamplingParams(**{field: value})
    assert "\n" not in str(error.value)


def test_ids_outside_the_vocabulary() -> None:
    with pytest.raises(SamplingError, match="token id 5 is not in the vocabulary; expected 0 to 4"):
        sampler(SamplingParams(logit_bias={5: 1.0}))


def test_defaults_come_from_the_checkpoint() -> None:
    released = GenerationDefaults()
    used = SamplingParams(top_p=0.9).resolve(released)
    assert (used.temperature, used.top_p, used.top_k, used.max_tokens) == (1.0, 0.9, 0, 512)
    greedy = SamplingParams().resolve(PLAIN)
    assert (greedy.temperature, greedy.top_p) == (0.0, 1.0)
