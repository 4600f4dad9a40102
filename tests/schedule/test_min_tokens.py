"""Answers of at least `min_tokens` tokens, presence and frequency penalties, and <|endoftext|> as the only end."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

from qvl_kernels import cpu, reference
from qvl_runtime import Engine, SamplingParams
from qvl_runtime.config.generation import GenerationDefaults
from qvl_runtime.errors import SamplingError
from qvl_runtime.prompt.token_mask import all_of, holds, mask_of, none_of, remove, tokens_of
from qvl_runtime.schedule.sampler import sample
from qvl_runtime.schedule.sampling_state import SamplingRow, SamplingState

pytestmark = pytest.mark.cpu
GREEDY = SamplingParams(temperature=0, max_tokens=40)
QUESTION = [{"role": "user", "content": "How many things are there?"}]
PLAIN = GenerationDefaults(do_sample=False)


def samplers() -> list[ModuleType]:
    if find_spec("triton") is None:
        return [reference, cpu]
    from qvl_kernels import triton

    return [reference, cpu, triton]


def state(params: SamplingParams, vocab: int, end_ids: tuple[int, ...] = ()) -> SamplingState:
    return SamplingState(params.resolve(PLAIN), (), vocab, torch.device("cpu"), end_ids=end_ids)


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 97, 151936])
def test_a_bitset_is_a_set_of_tokens(vocab: int) -> None:
    chosen = sorted({0, vocab - 1, vocab // 2, min(31, vocab - 1)})
    mask = mask_of(chosen, vocab)
    assert tokens_of(mask).tolist() == chosen and all(holds(mask, token) for token in chosen)
    assert len(tokens_of(all_of(vocab))) == vocab and not tokens_of(none_of(vocab)).size
    remove(mask, chosen[:1])
    assert tokens_of(mask).tolist() == chosen[1:]


@pytest.mark.parametrize("ops", samplers(), ids=lambda ops: ops.__name__.rsplit(".", 1)[-1])
@pytest.mark.parametrize("vocab", [33, 2500])
def test_a_forbidden_token_is_never_chosen(ops: ModuleType, vocab: int) -> None:
    """Greedy and drawn, the likeliest tokens being forbidden; log probabilities are those of the model all the same."""
    if ops.__name__.endswith("triton") and vocab > 33:
        pytest.skip("the interpreter of Triton is slow: one vocabulary is enough")
    ends = tuple(range(0, vocab, 2))
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(3))
    logits[:, list(ends)] += 20
    kinds = [SamplingParams(temperature=t, min_tokens=5, seed=i) for i, t in enumerate((0, 0, 1.0, 2.0, 0, 1.0))]
    kinds[4] = replace(kinds[4], repetition_penalty=1.2)
    kinds[5] = SamplingParams(temperature=0)  # its neighbors' masks do not concern it
    states = [state(p, vocab, ends) for p in kinds]
    rows = [own.rows(4)[0] for own in states]
    for selected in ([0, 1, 5], list(range(6))):
        found = sample(logits[selected], [rows[i] for i in selected], ops)
        for i, got in zip(selected, found, strict=True):
            assert got.error is None
            assert (got.token_id % 2 == 1) == (i != 5)
            assert got.logprob.logprob == pytest.approx(float(logits[i].log_softmax(-1)[got.token_id]), abs=1e-4)
            if not kinds[i].temperature:
                allowed = logits[i] if i == 5 else logits[i].clone()
                if i != 5:
                    allowed[list(ends)] = -torch.inf
                assert got.token_id == int(allowed.argmax())
    later = sample(logits, [own.rows(5)[0] for own in states], ops)
    assert all(got.token_id % 2 == 0 for got in later)


@pytest.mark.parametrize("ops", samplers(), ids=lambda ops: ops.__name__.rsplit(".", 1)[-1])
def test_penalties_are_those_of_openai(ops: ModuleType) -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, with the counts c of the answer; steps 0.7 and 0.1 by hand."""
    logits = torch.tensor([[2.0, 1.95, 1.0, 0.0]])
    params = SamplingParams(temperature=0, presence_penalty=0.7, frequency_penalty=0.1)
    own, want, counts = state(params, 4), [], torch.zeros(4)
    chosen = []
    for position in range(9):
        want.append(int((logits[0] - 0.1 * counts - 0.7 * (counts > 0)).argmax()))
        counts[want[-1]] += 1
        chosen.append(sample(logits, [SamplingRow(own, position)], ops)[0].token_id)
    assert chosen == want and {0, 1, 2} == set(chosen)
    own.restore((), chosen[:3])
    assert sample(logits, [SamplingRow(own, 3)], ops)[0].token_id == want[3]
    assert not own.foreseeable  # no drafts: each position depends on the previous ones


def test_penalties_leave_biases_and_the_prompt(nano: Engine) -> None:
    biased = state(SamplingParams(temperature=0, presence_penalty=2.0, logit_bias={1: 3.0, 2: float("-inf")}), 4)
    logits = torch.tensor([[0.0, 0.0, 9.0, 2.5]])
    assert [sample(logits, [SamplingRow(biased, i)])[0].token_id for i in range(3)] == [1, 3, 1]
    text = nano.generate("red red red", replace(GREEDY, max_tokens=3))[0].token_ids
    assert nano.generate("red red red", replace(GREEDY, max_tokens=3, presence_penalty=1e-4))[0].token_ids == text


def test_an_answer_has_its_least_tokens(nano: Engine) -> None:
    short = nano.chat(QUESTION, GREEDY)
    assert short.finish_reason == "stop" and len(short.token_ids) < 12
    longer = nano.chat(QUESTION, replace(GREEDY, min_tokens=12))
    same = len(short.token_ids) - 1
    assert longer.token_ids[:same] == short.token_ids[:same] and len(longer.token_ids) >= 12
    ends = nano.encode("x").prompt.stop_ids
    assert not ends & set(longer.token_ids[:12])
    drafted = Engine(dtype="float32", max_model_len=512, speculative_tokens=4)
    assert drafted.chat(QUESTION, replace(GREEDY, min_tokens=12)).token_ids == longer.token_ids
    several = nano.chat(QUESTION, replace(GREEDY, min_tokens=12, temperature=2.0, seed=1, n=4))
    assert all(len(answer.token_ids) >= 12 for answer in several.answers)
    first = short.token_ids[0]
    assert first not in nano.chat(QUESTION, replace(GREEDY, min_tokens=12, stop_token_ids=(first,))).token_ids[:12]


def test_stop_strings_count_after_the_least_tokens(nano: Engine) -> None:
    text = nano.chat(QUESTION, replace(GREEDY, ignore_eos=True, max_tokens=20))
    piece = nano.tokenizer.decode(text.token_ids[:1])
    stopped = nano.chat(QUESTION, replace(GREEDY, ignore_eos=True, max_tokens=20, stop=(piece,), min_tokens=3))
    assert stopped.text.startswith(piece) and len(stopped.token_ids) > 3


def test_only_the_end_of_the_text_ends_it(nano: Engine) -> None:
    """A chat checkpoint that continues a plain string ends it at <|endoftext|>, as the original's evaluation has it."""
    tokens = nano.tokenizer
    usual = nano.chat(QUESTION, GREEDY)
    assert usual.token_ids[-1] == tokens.im_end
    on = nano.chat(QUESTION, replace(GREEDY, end_of_text_only=True))
    assert on.token_ids[: len(usual.token_ids)] == usual.token_ids and len(on.token_ids) > len(usual.token_ids)
    bias = {tokens.endoftext: 1000.0}
    ended = nano.generate("A", replace(GREEDY, end_of_text_only=True, logit_bias=bias))[0]
    assert (ended.finish_reason, ended.token_ids, ended.text) == ("stop", (tokens.endoftext,), "")
    more = nano.generate("A", replace(GREEDY, end_of_text_only=True, ignore_eos=True, logit_bias=bias, max_tokens=3))[0]
    assert more.finish_reason == "length"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_tokens", -1),
        ("min_tokens", None),
        ("min_tokens", 1.5),
        ("presence_penalty", 2.1),
        ("presence_penalty", None),
        ("frequency_penalty", float("nan")),
        ("frequency_penalty", "much"),
        ("end_of_text_only", 1),
    ],
)
def test_out_of_range(field: str, value: object) -> None:
    with pytest.raises(SamplingError, match=rf"^{field} is .*; expected "):
        SamplingParams(**{field: value})


def test_what_cannot_be() -> None:
    with pytest.raises(SamplingError, match="min_tokens is 5 and max_tokens 4; expected no more"):
        SamplingParams(min_tokens=5, max_tokens=4)
    params = SamplingParams(min_tokens=1, logit_bias=dict.fromkeys((0, 1), float("-inf")))
    with pytest.raises(SamplingError, match="every token of 3, and min_tokens those that end the answer"):
        state(params, 3, end_ids=(2,))
