"""Whatever is chosen among the tokens that the grammar allows, each box parses, strictly, and the answer can end."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from itertools import product

import pytest

from qvl_runtime.engine.engine import NANO
from qvl_runtime.errors import ConstraintError
from qvl_runtime.prompt.box_grammar import BoxGrammar
from qvl_runtime.prompt.box_rules import ALLOW, FORCE, BoxRules, rules_of
from qvl_runtime.prompt.box_spelling import BoxSpelling
from qvl_runtime.prompt.boxes import Box, parse_boxes
from qvl_runtime.prompt.token_mask import tokens_of
from qvl_runtime.prompt.tokenizer import Tokenizer

pytestmark = pytest.mark.unit
BOXES = int(os.environ.get("QVL_BOXES", "150"))  # of each kind of rules: make it 10000 for the whole
VOCAB = 1152  # nano's rows of logits, of which 1113 have a token
VARIANTS = [
    FORCE,
    ALLOW,
    BoxRules(labels="required", quads=False),
    BoxRules(labels="none", most=1),
    BoxRules(before=True, least=2, most=3),
    BoxRules(before=True, between=True, labels="required", least=1),
    BoxRules(after=True, most=1),
]


@pytest.fixture(scope="module")
def spelling() -> BoxSpelling:
    return BoxSpelling(Tokenizer.from_folder(NANO))


def grammar(spelling: BoxSpelling, rules: BoxRules, limit: int = 200, prompt: str = "") -> BoxGrammar:
    tokens = spelling.tokenizer
    return BoxGrammar(spelling, rules, VOCAB, (tokens.im_end, tokens.endoftext), limit, tokens.encode(prompt))


def walk(constraint: BoxGrammar, limit: int, choose: Callable[[list[int]], int]) -> tuple[list[int], str]:
    """Tokens up to the end, the limit or the point from which nothing may follow."""
    ids: list[int] = []
    ends = {constraint.spelling.tokenizer.im_end, constraint.spelling.tokenizer.endoftext}
    while len(ids) < limit and not constraint.done:
        legal = tokens_of(constraint.mask()).tolist()
        assert legal, spelled(constraint.spelling, ids)
        forced = constraint.forced()
        assert not forced or legal == forced[:1]
        token = choose(legal)
        assert constraint.advance(token)
        if token in ends:
            return ids, "stop"
        ids.append(token)
    return ids, "done" if constraint.done else "length"


def spelled(spelling: BoxSpelling, ids: list[int]) -> str:
    return b"".join(spelling.tokenizer.token_bytes(t) for t in ids if t < spelling.tokenizer.n_vocab).decode(
        "utf-8", "replace"
    )


def check(box: Box) -> None:
    if box.quad is None:
        assert 0 <= box.x1 < box.x2 <= 1000 and 0 <= box.y1 < box.y2 <= 1000
    else:
        assert all(0 <= number <= 1000 for point in box.quad for number in point)


@pytest.mark.parametrize("rules", VARIANTS, ids=range(len(VARIANTS)))
def test_every_box_is_well_formed(spelling: BoxSpelling, rules: BoxRules) -> None:
    """Any token is as likely as any other, at any limit; tags are tried half of the time, to reach them at all."""
    dice = random.Random(7)
    tags = {*spelling.tags, spelling.tokenizer.im_end}
    found = 0
    while found < BOXES:
        limit = dice.choice((60, 75, 90, 130, 200))
        try:
            constraint = grammar(spelling, rules, limit)
        except ConstraintError:
            assert rules.least == 2 or limit < 60
            continue

        def choose(legal: list[int]) -> int:
            marked = [token for token in legal if token in tags]
            return dice.choice(marked if marked and dice.random() < 0.4 else legal)

        ids, reason = walk(constraint, limit, choose)
        text = spelled(spelling, ids)
        boxes = parse_boxes(text, strict=True)
        for box in boxes:
            check(box)
            assert rules.labels != "required" or box.label is not None or "<ref>" in text
        assert len(boxes) >= rules.least and (rules.most is None or len(boxes) <= rules.most)
        assert rules.quads or not any(box.quad for box in boxes)
        if not (rules.before or rules.between or rules.after):
            assert not parse_free_text(text)
        found += max(1, len(boxes))
        assert reason in ("stop", "done", "length")


def parse_free_text(text: str) -> str:
    """What stands outside of labels and boxes."""
    import re

    return re.sub(r"<(ref|box|quad)>.*?</\1>", "", text, flags=re.DOTALL)


def test_numbers_are_those_of_the_interval(spelling: BoxSpelling) -> None:
    """Every coordinate from 0 to 1000 and no other; the second corner beyond the first; no leading zeros."""
    tokens = spelling.tokenizer

    def legal(text: str) -> bool:
        constraint, ids = grammar(spelling, BoxRules(labels="none", most=1)), tokens.encode(text)
        return constraint.accepts(ids) == len(ids)

    for x in (*range(0, 1002, 7), 999, 1000, 1001):
        assert legal(f"<box>({x},0),(1000,1)</box>") == (x < 1000)
        assert legal(f"<box>(500,0),({x},1)</box>") == (500 < x <= 1000)
        assert legal(f"<quad>({x},0),(0,0),(0,0),(0,{x})</quad>") == (x <= 1000)
    for bad in ("(01,2),", "(00,", "(,", "(1,2),(1,3)", "(1,2),(2,2)", "(1, 2)", "( 1", "(-1", "(1.5"):
        assert not legal(f"<box>{bad}"), bad
    for x1, x2 in product((0, 9, 10, 99, 100, 998, 999), (1, 9, 10, 99, 100, 999, 1000)):
        assert legal(f"<box>({x1},5),({x2},6)</box>") == (x1 < x2)


def test_forced_tokens_are_followed_at_once(spelling: BoxSpelling) -> None:
    tokens, constraint = spelling.tokenizer, grammar(spelling, BoxRules(labels="none", quads=False, most=1))
    assert constraint.forced() == tokens.encode("<box>(")
    for token in tokens.encode("<box>(123,456"):
        assert constraint.advance(token)
    assert constraint.forced() == tokens.encode("),(")
    for token in tokens.encode("),(999"):
        assert constraint.advance(token)
    assert constraint.forced() == tokens.encode(",")  # 9990 is beyond the grid
    for token in tokens.encode(",1000"):
        assert constraint.advance(token)
    assert constraint.forced() == tokens.encode(")</box>")
    assert not constraint.done
    for token in constraint.forced():
        assert constraint.advance(token)
    assert constraint.done


RULES = [
    FORCE,
    ALLOW,
    BoxRules(before=True, least=2, most=3, labels="required"),
    BoxRules(between=True, least=3, labels="none", quads=False),
]


@pytest.mark.parametrize("rules", RULES)
def test_far_from_the_end_its_distance_makes_no_difference(spelling: BoxSpelling, rules: BoxRules) -> None:
    """What is looked up for all answers is what would be computed for each, right up to the bound."""
    dice, far = random.Random(4), grammar(spelling, rules, 1 << 20)._table.far
    for _ in range(12):
        long = grammar(spelling, rules, 1 << 20)
        ids, _ = walk(long, 120, dice.choice)
        for length in range(len(ids) + 1):
            states = [grammar(spelling, rules, limit) for limit in (length + far + 1, 1 << 20)]
            for one in states:
                assert one.accepts(ids[:length]) == length
                assert all(map(one.advance, ids[:length]))
            near, other = (one._state for one in states)
            if near.within is None:
                found = [one._compute_legal(one._state) for one in states]
                for legal in (found[1], states[0]._find_legal(near), states[1]._find_legal(other)):
                    assert (legal.ids, legal.text, legal.done) == (found[0].ids, found[0].text, found[0].done)
                    assert (legal.mask == found[0].mask).all()


def test_rollback_and_fork(spelling: BoxSpelling) -> None:
    dice = random.Random(3)
    whole = grammar(spelling, FORCE, 90)
    ids, _ = walk(whole.fork(), 90, dice.choice)
    for at in range(len(ids)):
        ahead = dice.randrange(len(ids) - at)
        other = whole.fork()
        assert whole.accepts(ids[at : at + ahead]) == ahead
        for token in ids[at : at + ahead]:
            assert whole.advance(token)
        whole.rollback(ahead)
        assert (whole.mask() == other.mask()).all() and not whole.advance(VOCAB + 5)
        assert whole.advance(ids[at])


@pytest.mark.parametrize(
    ("prompt", "rest"),
    [
        ("<ref>the dog</ref>", "<box>(1,2),(3,4)</box>"),
        ("<ref>the dog</ref><box>", "(1,2),(3,4)</box>"),
        ("<ref>the dog</ref><box>(12,3", "4),(13,50)</box>"),
        ("<box>(12,34),(", "500,600)</box>"),
        ("<ref>the", " dog</ref><box>(1,2),(3,4)</box>"),
        ("<box>(1,2),(3,4)</box> <ref>a</ref> and", "<ref>dog</ref><box>(1,2),(3,4)</box>"),
        ("Where is <ref>a dog</ref>?\n", "<box>(1,2),(3,4)</box>"),
    ],
)
def test_a_prompt_may_end_anywhere(spelling: BoxSpelling, prompt: str, rest: str) -> None:
    ids = spelling.tokenizer.encode(rest)
    constraint = grammar(spelling, FORCE, prompt=prompt)
    assert constraint.accepts(ids) == len(ids)
    limit = grammar(spelling, BoxRules(most=1), prompt="<ref>the dog</ref><box>")
    assert limit.accepts(spelling.tokenizer.encode("(100,200),(300,400)</box>")) <= 18


def test_text_spells_no_tags_in_letters(spelling: BoxSpelling) -> None:
    """The parser reads text: `<`, `box`, `>` would be a tag, so the token that completes it may not come."""
    tokens = spelling.tokenizer
    for tag in ("<box>", "</ref>", "<quad>"):
        letters = tokens.encode("a " + tag, "none")
        assert grammar(spelling, ALLOW).accepts(letters) == len(letters) - 1
    plain = tokens.encode("x < y > z <b> <boxes> </boxer", "none")
    assert grammar(spelling, ALLOW).accepts(plain) == len(plain)
    padded = [*tokens.encode("<box", "none"), 1150, *tokens.encode(">", "none")]  # a row without a token adds no text
    assert grammar(spelling, ALLOW).accepts(padded) == len(padded) - 1


def test_halves_of_a_tag_around_a_label_are_text() -> None:
    assert parse_boxes("a <ref<ref>dog</ref>> b", strict=True) == []


def test_what_cannot_be_is_refused(spelling: BoxSpelling) -> None:
    with pytest.raises(ConstraintError, match=r"may have 10 tokens, but its boxes need up to [0-9]+: raise max_tokens"):
        grammar(spelling, FORCE, 10)
    for given in ({"labels": "some"}, {"least": -1}, {"least": 2, "most": 1}, {"most": 0}):
        with pytest.raises(ConstraintError, match="expected"):
            BoxRules(**given)
    with pytest.raises(ConstraintError, match="boxes is 'all'; expected 'force', 'allow' or BoxRules"):
        rules_of("all")
