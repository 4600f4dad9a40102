"""The choice of a token: each rule by itself against its definition, and their order."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from types import ModuleType

import pytest
import torch
from torch import Tensor

from qvl_kernels import cpu, reference
from qvl_kernels.reference.sampling import CANDIDATES
from qvl_runtime.config.generation import GenerationDefaults
from qvl_runtime.errors import SamplingError
from qvl_runtime.schedule.api import SamplingParams
from qvl_runtime.schedule.penalties import PenaltyStack
from qvl_runtime.schedule.sampler import Sample, sample
from qvl_runtime.schedule.sampling_rows import sampling_rows
from qvl_runtime.schedule.sampling_state import SamplingRow, SamplingState

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")
PLAIN = GenerationDefaults(do_sample=False)
LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0])


def draws(params: SamplingParams, prompt: tuple[int, ...] = (), vocab: int = 5) -> SamplingState:
    return SamplingState(params.resolve(PLAIN), prompt, vocab, CPU)


def sampler(params: SamplingParams, prompt: tuple[int, ...] = ()) -> Callable[[Tensor], Sample]:
    """One answer by itself, token after token."""
    own, positions = draws(params, prompt), count()
    return lambda logits: sample(logits[None], [SamplingRow(own, next(positions))])[0]


def drawn(logits: Tensor, params: SamplingParams, times: int = 2000) -> list[int]:
    """Tokens of as many answers with different seeds, all in one call."""
    rows = [SamplingRow(draws(replace(params, seed=i), vocab=len(logits)), 0) for i in range(times)]
    return [s.token_id for s in sample(logits.expand(times, -1), rows)]


@pytest.mark.parametrize("ops", [reference, cpu], ids=["reference", "cpu"])
def test_the_likeliest_by_a_kernel(ops: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that want nothing else go through `greedy` and find the same; any other row sends all through `sample`."""
    passes, greedy = [], ops.greedy
    monkeypatch.setattr(ops, "greedy", lambda logits: passes.append(len(logits)) or greedy(logits))  # type: ignore[func-returns-value]
    choose, logits = partial(sample, ops=ops), torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    logits[0, 10:12] = 9.0
    for params, expected in (
        (SamplingParams(temperature=0), [3]),
        (SamplingParams(temperature=1.0, seed=0), []),
        (SamplingParams(temperature=0, logprobs=2), [3]),
        (SamplingParams(temperature=0, repetition_penalty=1.3), []),
        (SamplingParams(temperature=0, logit_bias={3: 20.0}), []),
    ):
        passes.clear()
        plain, other = SamplingParams(temperature=0), params
        rows = [[SamplingRow(draws(p, (1, 2), 1000), 0) for p in (plain, other, plain)] for _ in range(2)]
        found = choose(logits, rows[0])
        assert passes == expected
        want = sample(logits, rows[1])
        assert [s.token_id for s in found] == [s.token_id for s in want]
        for got, wanted in zip(found, want, strict=True):
            assert got.logprob.logprob == pytest.approx(wanted.logprob.logprob, rel=1e-5)
            assert [token for token, _ in got.logprob.top] == [token for token, _ in wanted.logprob.top]
            assert dict(got.logprob.top) == pytest.approx(dict(wanted.logprob.top), rel=1e-5)


@pytest.mark.parametrize("ops", [reference, cpu], ids=["reference", "cpu"])
def test_logprobs_do_not_depend_on_the_other_rows(ops: ModuleType) -> None:
    """Also among ties: which of them are the likeliest depends on how many are asked for, which others may exceed."""
    logits = (torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)) * 2).bfloat16()
    several = [
        SamplingParams(temperature=t, seed=0, logprobs=n) for t, n in ((0, 5), (1, 9), (0, None), (2, 20), (0, 5))
    ]
    together = sample(logits, [SamplingRow(draws(p, vocab=1000), 0) for p in several], ops)
    for i, params in enumerate(several):
        assert sample(logits[i : i + 1], [SamplingRow(draws(params, vocab=1000), 0)], ops) == [together[i]]


def test_a_row_does_not_feel_its_neighbors() -> None:
    """A row's sample depends neither on the other rows' penalties, biases and cuts nor on its index in the batch."""
    vocab = 3 * CANDIDATES
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(0))
    kinds = [
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=3.0, top_p=0.999, seed=2),
        SamplingParams(temperature=0.2, top_p=0.5, seed=3, repetition_penalty=1.5),
        SamplingParams(temperature=2.0, top_k=2 * CANDIDATES, top_p=0.5, seed=4, logprobs=3),
        SamplingParams(temperature=1.0, min_p=0.5, seed=5, logit_bias={7: 3.0}),
    ]

    def rows(order: list[int]) -> list[SamplingRow]:
        return [SamplingRow(draws(kinds[i], (1, 2, 3), vocab), 11) for i in order]

    alone = [sample(logits[i : i + 1], rows([i]))[0] for i in range(6)]
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4]):
        together = sample(logits[order], rows(order))
        assert [s.token_id for s in together] == [alone[i].token_id for i in order]
        assert [s.logprob.logprob for s in together] == pytest.approx([alone[i].logprob.logprob for i in order])


@pytest.mark.parametrize("params", [SamplingParams(top_p=0.9), SamplingParams(top_k=40), SamplingParams(min_p=0.05)])
def test_looking_at_a_part_of_the_vocabulary_is_as_good_as_at_all(
    params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = 3 * torch.randn(2 * CANDIDATES, generator=torch.Generator().manual_seed(0))
    params = replace(params, temperature=1.0)
    some = drawn(logits, params, 200)
    monkeypatch.setattr("qvl_kernels.reference.sampling.CANDIDATES", len(logits))
    assert drawn(logits, params, 200) == some and len(set(some)) > 5


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
        (SamplingParams(top_p=0.5), [0, 1]),  # 0.483 < 0.5: the token that reaches p is kept
        (SamplingParams(top_p=1.0), [0, 1, 2, 3, 4]),
        (SamplingParams(min_p=0.3), [0, 1, 2]),  # e^(-1/1.5) = 0.51 and e^(-1.5/1.5) = 0.37 of the likeliest, then 0.14
        (SamplingParams(top_k=3, top_p=0.53), [0]),  # top-p counts what top-k left: 0.532 of three, 0.483 of all
    ],
)
def test_cuts(params: SamplingParams, survivors: list[int]) -> None:
    assert sorted(set(drawn(LOGITS, replace(params, temperature=1.5)))) == survivors


def test_draws_follow_the_distribution() -> None:
    n = 4000
    counts = torch.bincount(torch.tensor(drawn(LOGITS, SamplingParams(temperature=0.7), n)), minlength=5) / n
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
        ("max_tokens", 0),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("n", 0),
        ("logprobs", -1),
        ("stop", ("",)),
        ("stop", (1,)),
        ("stop_token_ids", ("a",)),
        ("logit_bias", {1: "x"}),
        ("logit_bias", {1: math.inf}),
        ("max_tokens", 2.5),
        ("n", 1.5),
        ("logprobs", True),
        ("temperature", "hot"),
    ],
)
def test_out_of_range(field: str, value: object) -> None:
    with pytest.raises(SamplingError, match=rf"^{field} is .*; expected ") as error:
        SamplingParams(**{field: value})
    assert "\n" not in str(error.value)


def test_ids_outside_the_vocabulary() -> None:
    with pytest.raises(SamplingError, match="token id 5 is not in the vocabulary; expected 0 to 4"):
        draws(SamplingParams(logit_bias={5: 1.0}))


def test_defaults_come_from_the_checkpoint() -> None:
    released = GenerationDefaults()
    used = SamplingParams(top_p=0.9).resolve(released)
    assert (used.temperature, used.top_p, used.top_k, used.max_tokens) == (1.0, 0.9, 0, 512)
    greedy = SamplingParams().resolve(PLAIN)
    assert (greedy.temperature, greedy.top_p) == (0.0, 1.0)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13])
def test_parameters_begin_where_kernels_expect_them(count: int) -> None:
    """At multiples of 16 bytes for any number of rows: for others, Triton would compile kernels while others wait."""
    params = SamplingParams(temperature=0.7, top_p=0.9, top_k=3, min_p=0.1, repetition_penalty=1.2, seed=5)
    states = [SamplingState(params.resolve(PLAIN), (1,), 40, torch.device("cpu")) for _ in range(count)]
    rows = sampling_rows(torch.device("cpu"), [SamplingRow(s, i) for i, s in enumerate(states)], PenaltyStack())
    assert rows is not None and rows.penalty is not None and rows.slots is not None
    columns = (rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.uniform, rows.penalty, rows.slots)
    assert all((column.data_ptr() - rows.uniform.data_ptr()) % 16 == 0 for column in columns)
    assert all(column.shape == (count,) and column.is_contiguous() for column in columns)
    assert rows.slots.tolist() == [*range(count)]
    assert rows.uniform.tolist() == [state.uniform(i) for i, state in enumerate(states)]
    for column, value in zip(columns[:4], (0.7, 3, 0.9, 0.1), strict=True):
        assert column.tolist() == pytest.approx([value] * count)
