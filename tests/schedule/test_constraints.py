"""Constraints in steps: graphs, drafts, several answers, preemption, failures; and what they leave as it was."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from qvl_kernels import cpu, reference
from qvl_runtime import Engine, SamplingParams
from qvl_runtime.config.generation import GenerationDefaults
from qvl_runtime.errors import ConstraintError, QVLError
from qvl_runtime.prompt.box_rules import BoxRules
from qvl_runtime.prompt.boxes import parse_boxes
from qvl_runtime.prompt.token_mask import Mask, mask_of, tokens_of
from qvl_runtime.schedule.constraint import Constraint
from qvl_runtime.schedule.sampler import sample
from qvl_runtime.schedule.sampling_state import SamplingState

pytestmark = pytest.mark.cpu
GREEDY = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=60)
BOXES = int(os.environ.get("QVL_BOXES", "64"))


def samplers() -> list[ModuleType]:
    if find_spec("triton") is None:
        return [reference, cpu]
    from qvl_kernels import triton

    return [reference, cpu, triton]


class Only:
    """A constraint for tests: these tokens and no others, in any order, until there are `count`; then it is done."""

    def __init__(self, vocab: int, tokens: Iterable[int], count: int = 5, fails_at: int | None = None) -> None:
        self.vocab, self.tokens, self.count, self.fails_at = vocab, tuple(tokens), count, fails_at
        self.taken: list[int] = []

    @property
    def done(self) -> bool:
        return len(self.taken) >= self.count

    def mask(self) -> Mask:
        if len(self.taken) == self.fails_at:
            raise ConstraintError("the grammar became too complex")
        return mask_of(self.tokens, self.vocab)

    def advance(self, token: int) -> bool:
        if token in self.tokens:
            self.taken.append(token)
        return token in self.tokens

    def accepts(self, tokens: Iterable[int]) -> int:
        legal = [token in self.tokens for token in tokens]
        return legal.index(False) if False in legal else len(legal)

    def rollback(self, count: int) -> None:
        del self.taken[len(self.taken) - count :]

    def fork(self) -> Only:
        return Only(self.vocab, self.tokens, self.count, self.fails_at)

    def forced(self) -> list[int]:
        return list(self.tokens) * (self.count - len(self.taken)) if len(self.tokens) == 1 else []


def asked(engine: Engine, constraint: Constraint | None, params: SamplingParams = GREEDY, prompt: str = "Hello") -> Any:
    """Submit a prompt under a constraint of its own."""
    resolved = params.resolve(engine.defaults)
    begin = None if constraint is None else lambda ends, limit: constraint.fork()
    return engine.core.submit(engine.encode(prompt).prompt, resolved, constrain=begin)


def run(engine: Engine, *requests: Any) -> None:
    while not all(request.done for request in requests):
        assert engine.core.step()


def state(params: SamplingParams, vocab: int, constraint: Constraint, ends: tuple[int, ...] = ()) -> SamplingState:
    resolved = params.resolve(GenerationDefaults(do_sample=False))
    return SamplingState(resolved, (), vocab, torch.device("cpu"), end_ids=ends, constraint=constraint)


@pytest.mark.parametrize("ops", samplers(), ids=lambda ops: ops.__name__.rsplit(".", 1)[-1])
def test_the_constraint_wins(ops: ModuleType) -> None:
    """Whatever biases and penalties say, a token of the mask is chosen, with its own log probability, never NaN."""
    vocab, legal = 70, (3, 40, 69)
    logits = torch.randn(7, vocab, generator=torch.Generator().manual_seed(0))
    logits[:, list(legal)] -= 30
    forbid, down = dict.fromkeys(legal, float("-inf")), dict.fromkeys(legal, -100.0)
    kinds = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, logit_bias=forbid),
        SamplingParams(temperature=0, logit_bias=down, presence_penalty=1.0),
        SamplingParams(temperature=1.0, seed=1, logit_bias=forbid, repetition_penalty=1.5),
        SamplingParams(temperature=1.0, seed=2, logit_bias=down, top_p=0.3),
        SamplingParams(temperature=0, min_tokens=9),
        SamplingParams(temperature=0, logit_bias={40: float("-inf"), 3: float("-inf")}),
    ]
    states = [state(p, vocab, Only(vocab, legal), ends=legal if p.min_tokens else ()) for p in kinds]
    for chosen in ([0, 1, 5, 6], range(7)):
        found = sample(logits[list(chosen)], [states[i].rows(0)[0] for i in chosen], ops)
        for i, got in zip(chosen, found, strict=True):
            assert got.error is None and got.token_id in legal
            assert got.logprob.logprob == pytest.approx(float(logits[i].log_softmax(-1)[got.token_id]), abs=1e-4)
            if i in (0, 1, 5):
                assert got.token_id == legal[int(logits[i, list(legal)].argmax())]
            assert i != 6 or got.token_id == 69
    with pytest.raises(ConstraintError, match="leaves no token for position 4"):
        state(GREEDY, vocab, Only(vocab, ())).rows(4)


def test_masks_along_drafts_leave_no_trace() -> None:
    constraint = Only(64, (1, 2, 33))
    own = state(GREEDY, 64, constraint)
    assert own.draft(lambda: (1, 2, 9, 1), 8) == ((1, 2), False)
    rows = own.rows(0, (1, 2))
    assert len(rows) == 3 and constraint.taken == []
    assert all(row.allowed is not None and tokens_of(row.allowed).tolist() == [1, 2, 33] for row in rows)
    forced = state(GREEDY, 64, Only(64, (7,), count=4))
    assert forced.draft(lambda: (1,), 8) == ((7, 7, 7, 7), True) and forced.draft(lambda: (), 2)[0] == (7, 7)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    scene = Image.new("RGB", (144, 144), (150, 160, 170))
    pen = ImageDraw.Draw(scene)
    pen.ellipse((20, 30, 70, 78), fill=(220, 30, 30))
    pen.rectangle((85, 80, 130, 128), fill=(30, 60, 220))
    return scene


QUESTIONS = ("Generate the caption in English with grounding:", "Box the red circle.", "How many things are there?")


def questions(image: Image.Image) -> list[Any]:
    return [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
        for text in QUESTIONS
    ]


MODES: dict[str, dict[str, Any]] = {
    "graphs": {},
    "no graphs": {"graphs": False},
    "drafts": {"speculative_tokens": 4},
    "small steps": {"max_step_tokens": 64, "max_running": 2},
}


@pytest.mark.parametrize("mode", MODES)
def test_what_is_legal_anyway_stays(mode: str, image: Image.Image) -> None:
    """Greedy answers of nano with the grammar of text and boxes: the same tokens, in every mode, several at once."""
    engine = Engine(dtype="float32", max_model_len=512, **MODES[mode])
    free = engine.generate(questions(image), GREEDY)
    held = engine.generate(questions(image), replace(GREEDY, boxes="allow"))
    assert [answer.token_ids for answer in free] == [answer.token_ids for answer in held]
    assert sum(len(answer.boxes) for answer in held) == 3
    forced = engine.generate(questions(image)[:2], replace(GREEDY, boxes="force"))
    assert [answer.text for answer in forced] == [answer.text for answer in free[:2]]
    for answer, same in zip(forced, free, strict=False):
        assert [got.logprob for got in answer.logprobs or ()] == [got.logprob for got in same.logprobs or ()]


def test_tiny_answers_stay(one_golden: Path) -> None:
    """A model of noise writes no tags: what it writes is legal where text is."""
    for graphs in (True, False):
        engine = Engine(one_golden / "tiny", dtype="float32", max_model_len=256, graphs=graphs, speculative_tokens=2)
        params = replace(GREEDY, max_tokens=20)
        prompts = ["Hello", "One two three", "<ref>x</ref><box>(1,2),(3,4)</box> and"]
        free = engine.generate(prompts, params)
        held = engine.generate(prompts, replace(params, boxes="allow"))
        tags = {
            engine.tokenizer.special_tokens[tag] for tag in ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
        }
        assert any(not tags & set(answer.token_ids) for answer in free)
        for answer, same in zip(held, free, strict=True):
            assert tags & set(same.token_ids) or answer.token_ids == same.token_ids


def test_random_answers_are_boxes() -> None:
    """At a temperature at which all tokens are as likely, in parallel, with a cache too small for all of them."""
    engine = Engine(dtype="float32", max_model_len=256, kv_cache_bytes=400 * 3 * 2 * 256 * 4, max_running=16)
    rules = BoxRules(labels="none", least=1, most=6)
    found = 0
    for seed in range(1 << 30):
        params = SamplingParams(temperature=1e6, seed=1000 * seed, n=16, boxes=rules, max_tokens=120)
        several = engine.generate("<ref>it</ref>", params)[0]
        for answer in several.answers:
            boxes = parse_boxes(answer.text, strict=True)
            assert set(map(str, boxes)) == {str(replace(box, score=None, image_index=None)) for box in answer.boxes}
            for box in boxes:
                assert box.quad or (0 <= box.x1 < box.x2 <= 1000 and 0 <= box.y1 < box.y2 <= 1000)
            assert answer.finish_reason in ("stop", "length") and 1 <= len(boxes) <= 6
            found += len(boxes)
        if found >= BOXES:
            break
    assert engine.core.scheduler.preemptions > 0
    engine.core.runner.cache.check_integrity()


def test_several_answers_have_constraints_of_their_own(nano: Engine) -> None:
    vocab = nano.config.vocab_size
    request = asked(nano, Only(vocab, (65, 66, 67, 68), count=7), replace(GREEDY, temperature=1e6, n=5, seed=3))
    run(nano, request)
    answers = request.completion().answers
    assert all(len(answer.token_ids) == 7 and answer.finish_reason == "stop" for answer in answers)
    assert len({answer.token_ids for answer in answers}) == 5 and set("".join(a.text for a in answers)) <= set("ABCD")


def test_forced_tokens_take_no_step_each(nano: Engine) -> None:
    vocab = nano.config.vocab_size
    before = nano.core.steps
    request = asked(nano, Only(vocab, (65,), count=12))
    run(nano, request)
    assert request.completion().text == "A" * 12 and nano.core.steps - before < 5
    assert all(got.logprob < 0 for got in request.branches[0].output.logprobs)  # the model's own, before the mask


def test_a_failing_constraint_ends_its_row_alone(nano: Engine) -> None:
    vocab = nano.config.vocab_size
    alone = asked(nano, None)
    run(nano, alone)
    fails = [asked(nano, Only(vocab, (65, 66), count=9, fails_at=at)) for at in (0, 1, 4)]
    empty = asked(nano, Only(vocab, (), count=9))
    several = asked(nano, Only(vocab, (65, 66), count=9, fails_at=2), replace(GREEDY, n=3))
    other, held = asked(nano, None), asked(nano, Only(vocab, (65, 66), count=9))
    steps = nano.core.steps
    run(nano, *fails, empty, several, other, held)
    assert nano.core.steps - steps < 70
    for request in (*fails, several):
        with pytest.raises(ConstraintError, match=r"^the grammar became too complex$"):
            request.completion()
    with pytest.raises(ConstraintError, match="leaves no token"):
        empty.completion()
    assert other.completion().token_ids == alone.completion().token_ids
    assert len(held.completion().token_ids) == 9
    nano.core.runner.cache.check_integrity()


def test_a_step_that_fails_leaves_constraints_as_they_were(nano: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab = nano.config.vocab_size
    want = asked(nano, Only(vocab, (65, 66, 67), count=9))
    run(nano, want)
    request, bad = asked(nano, Only(vocab, (65, 66, 67), count=9)), asked(nano, None, prompt="Bad")
    compute = nano.core.runner.compute

    def faulty(chunks: Any) -> Any:
        if any(chunk.sequence is bad.branches[0].sequence for chunk in chunks) and bad.branches[0].output.token_ids:
            raise RuntimeError("boom")
        return compute(chunks)

    monkeypatch.setattr(nano.core.runner, "compute", faulty)
    run(nano, request, bad)
    assert isinstance(bad.error, QVLError)
    assert request.completion().token_ids == want.completion().token_ids


def test_max_tokens_must_hold_a_box(nano: Engine) -> None:
    with pytest.raises(ConstraintError, match="the answer may have 8 tokens, but its boxes need up to"):
        nano.generate("Hello", SamplingParams(max_tokens=8, boxes="force"))
    with pytest.raises(ConstraintError, match="boxes is 'maybe'"):
        SamplingParams(boxes="maybe")
