"""The metrics of short answers and boxes, against hand-worked values and independent implementations."""

from __future__ import annotations

import random
from importlib.util import find_spec
from typing import Any

import pytest

from qvl_runtime.evaluate.metrics.anls import anls, levenshtein
from qvl_runtime.evaluate.metrics.boxes import NONE, box_accuracy, first_box, in_pixels, iou
from qvl_runtime.evaluate.metrics.exact import exact_match, gqa_answer, mme_answer
from qvl_runtime.evaluate.metrics.relaxed import relaxed_accuracy
from qvl_runtime.evaluate.metrics.vqa import normalized_answer, vqa_score, without_punctuation

pytestmark = pytest.mark.unit


def people(*answers: str, ids: bool = True) -> list[dict[str, Any]]:
    return [{"answer": answer, **({"answer_id": i} if ids else {})} for i, answer in enumerate(answers, 1)]


@pytest.mark.parametrize(
    ("answer", "records", "score"),
    [
        ("yes", people(*["yes"] * 10), 1.0),
        ("Yes.", people(*["yes"] * 10), 1.0),
        ("no", people(*["yes"] * 10), 0.0),
        # 1 of 10: left out, none of nine match; else 1 of 3, nine times.
        ("red", people("red", *["blue"] * 9), 0.3),
        # 2 of 10: twice 1/3, eight times 2/3.
        ("red", people(*["red"] * 2, *["blue"] * 8), 0.6),
        # 3 of 10: three times 2/3, seven times 1.
        ("red", people(*["red"] * 3, *["blue"] * 7), 0.9),
        ("red", people(*["red"] * 4, *["blue"] * 6), 1.0),
        ("two", people(*["2"] * 10), 1.0),
        ("The dogs", people(*["dogs"] * 10), 1.0),
        ("dont", people(*["don't"] * 10), 1.0),
        # The ten agree, so that none of them loses its punctuation, but the answer does.
        ("t-shirt", people(*["t-shirt"] * 10), 0.0),
        ("t-shirt", people(*["t-shirt"] * 9, "shirt"), 1.0),
    ],
)
def test_vqa_score(answer: str, records: list[dict[str, Any]], score: float) -> None:
    assert vqa_score(answer, records) == pytest.approx(score)


def test_vqa_records_without_ids_leave_out_their_equals() -> None:
    # Left out, "yes" takes all nine with it: no other record differs from it.
    assert vqa_score("yes", people(*["yes"] * 10, ids=False)) == 0.0


def independent_vqa(answer: str, answers: list[str]) -> float:
    """The usual closed form, for texts that need no normalization: leave one out, three of nine are enough."""
    same = answers.count(answer)
    return (same * min(1, (same - 1) / 3) + (10 - same) * min(1, same / 3)) / 10 if same else 0.0


def test_vqa_score_against_a_second_writing() -> None:
    rng = random.Random(0)
    for _ in range(300):
        answers = [rng.choice(["dog", "cat", "bird"]) for _ in range(10)]
        assert vqa_score("dog", people(*answers)) == pytest.approx(independent_vqa("dog", answers))


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("yes, it is", "yes it is"),  # the comma touches a blank
        ("and/or", "and or"),
        ("1,000", "1000"),  # a comma between digits removes all marks
        ("1,000 a/b", "1000 ab"),
        ("3.5", "3.5"),
        ("it is.", "it is"),
        ("5.a", "5a"),  # the tool's look-behind for a digit is misspelled
        ("x" + ".x" * 40, "x" * 33 + ".x" * 8),  # 32 full stops at most
    ],
)
def test_vqa_punctuation(text: str, plain: str) -> None:
    assert without_punctuation(text) == plain


def test_vqa_words() -> None:
    assert normalized_answer("The\nseven a dogs") == "7 dogs"
    assert normalized_answer("None of them") == "0 of them"


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("hello", ["hello"], 1.0),
        ("HELLO", ["hello"], 1.0),
        ("helo", ["hello"], 0.8),
        ("abcd", ["abxy"], 0.5),  # exactly the threshold counts
        ("abc", ["axy"], 0.0),
        ("b", ["abc", "b"], 1.0),  # the best of several
        ("", ["yes"], 0.0),
        ("", [""], 1.0),
        ("a  b", ["a c"], 0.75),  # one of four characters: the blanks count in the length only
    ],
)
def test_anls(answer: str, references: list[str], score: float) -> None:
    assert anls(answer, references) == pytest.approx(score)


@pytest.mark.skipif(find_spec("anls") is None, reason="needs anls: pip install it")
def test_anls_against_the_package() -> None:
    from anls import anls_score
    from anls.metrics.dist import levenshtein_distance

    rng = random.Random(1)
    for _ in range(300):
        one, *others = ("".join(rng.choice("abc ") for _ in range(rng.randint(1, 9))) for _ in range(4))
        one, others = " ".join(one.split()), [" ".join(other.split()) for other in others]
        assert levenshtein(one, others[0]) == levenshtein_distance(one, others[0])
        expected = anls_score(one, others)
        if expected == 0 and anls(one, others) == 0.5:
            continue  # the package leaves out the threshold itself, which the script of DocVQA counts
        assert anls(one, others) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("105", "100", 1),
        ("105.1", "100", 0),
        ("12%", "0.12", 1),
        ("12%", "12", 0),
        ("-3", "\u22123", 1),
        ("\u22122.9", "-3", 1),
        ("0", "0", 1),
        ("0.0", "0", 0),  # 5 % of nothing is nothing: compared as text
        ("Yes", "yes", 1),
        ("nan", "3", 0),
        ("1e2", "100", 1),
    ],
)
def test_relaxed_accuracy(answer: str, reference: str, score: float) -> None:
    assert relaxed_accuracy(f" {answer} ", [reference]) == score


def test_relaxed_accuracy_takes_any_reference() -> None:
    assert relaxed_accuracy("5", ["9", "5"]) == 1


@pytest.mark.parametrize(
    ("answer", "box"),
    [
        ("(1,2),(3,4)</box>", (1, 2, 3, 4)),
        ("<ref>x</ref><box>(10,20),(30,40)</box>(1,1),(2,2)", (10, 20, 30, 40)),
        ("(1),(3,4)", NONE),
        ("(a,b),(3,4)", NONE),
        ("(1,2,3),(3,4)", NONE),
        ("none", NONE),
        ("", NONE),
    ],
)
def test_first_box(answer: str, box: tuple[float, ...]) -> None:
    assert first_box(answer) == box


def test_box_accuracy_by_scale() -> None:
    # A box over 0 to 999 of the grid is the whole image at 999, and 99.8 % of it at 1000.
    assert in_pixels((0, 0, 999, 999), 100, 50) == (0, 0, 100, 50)
    assert in_pixels((0, 0, 999, 999), 1000, 500, 1000) == (0, 0, 999, 499.5)
    assert box_accuracy("(0,0),(999,999)", (0, 0, 100, 25), 100, 50) == 1  # exactly half
    assert box_accuracy("(0,0),(999,999)", (0, 0, 100, 25), 100, 50, 1000) == 1
    assert box_accuracy("nothing", (0, 0, 100, 25), 100, 50) == 0


def test_iou_by_hand() -> None:
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    assert iou(NONE, NONE) == 0


@pytest.mark.parametrize(
    ("answer", "cut"),
    [
        ("dog", "dog"),
        ("It is a dog.", "dog"),
        ("The dog of the man", "dog"),
        ("Pizza is good", "good"),
        ("a pizza a day", "pizz"),  # "a " ends "pizza ", too: the original's cut is kept
        ("yes, it is", "yes"),
        ("They are on the left! Indeed", "left"),
    ],
)
def test_gqa_answer(answer: str, cut: str) -> None:
    assert gqa_answer(answer) == cut


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("Yes", "yes"),
        ("no", "no"),
        ("No, it is not", "no"),
        ("yes.", "yes"),
        ("I do not know", "other"),
        (" yes", "yes"),
        ("Nothing", "no"),  # the first four characters hold "no"
        ("", "other"),
    ],
)
def test_mme_answer(answer: str, kind: str) -> None:
    assert mme_answer(answer) == kind


def test_exact_match_ignores_case_and_outer_blanks() -> None:
    assert exact_match(" The Cat ", ["dog", "the cat"]) == 1
    assert exact_match("cat", ["the cat"]) == 0
