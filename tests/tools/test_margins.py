"""The demo is right on every machine: each answer, on every instruction set, dtype, precision and checkpoint."""

from __future__ import annotations

import re

import pytest

from tools.nano.dialogue import Turn
from tools.nano.margins import demo_turns, instruction_sets, measure, right, variants

pytestmark = pytest.mark.cpu
LEAST = 1.0  # logits between a token that decides and its runner-up


@pytest.mark.parametrize("variant", list(variants(instruction_sets())), ids="-".join)
def test_every_answer_of_the_demo_is_right_with_a_margin(variant: tuple[str, str, str, str]) -> None:
    image, said = demo_turns()
    for turn, found in zip(said, measure(variant, image, said, LEAST), strict=True):
        assert found.right, f"{turn.question} {found.answer}"
        assert found.margin >= LEAST, f"{turn.question} {found.margin:.2f} logits from {found.instead}"


def test_what_is_right_is_what_the_scores_count() -> None:
    box = Turn("box", "Box the cat.", "<ref>cat</ref><box>(100,100),(300,300)</box>")
    assert right(box, "<ref>cat</ref><box>(103,98),(300,301)</box>"), "units of a coordinate do not decide"
    assert not right(box, "<ref>cat</ref><box>(700,100),(900,300)</box>")
    assert not right(box, "<ref>dog</ref><box>(100,100),(300,300)</box>")
    caption = Turn("caption", "", box.answer)
    assert right(caption, box.answer)
    assert not right(caption, box.answer + "<ref>dog</ref><box>(0,0),(1,1)</box>"), "a name too many"
    assert right(Turn("number", "", "2066"), "2066") and not right(Turn("number", "", "2066"), "2068")


def test_the_plan_holds_the_right_answers() -> None:
    image, said = demo_turns()
    assert image.size == (576, 576)
    caption, _, box = said
    named = re.findall(r"<ref>([^<]*)</ref>", caption.answer)
    assert len(named) == 3 and box.answer in caption.answer
    assert all(right(turn, turn.answer) for turn in said)
