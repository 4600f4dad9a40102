"""How nano is made: questions with one right answer, scores that count what they say, rows that teach the answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.engine.engine import NANO
from qvl_runtime.evaluate.metrics.boxes import iou
from qvl_runtime.evaluate.metrics.scenes import after_boxes, grounded_boxes
from qvl_runtime.prompt.boxes import parse_boxes
from qvl_runtime.prompt.conversations import read_conversations
from qvl_runtime.prompt.tokenizer import Tokenizer
from tools.nano.conversations import write_conversations
from tools.nano.dialogue import about_two, grounded, turns
from tools.nano.optimizer import orthogonal
from tools.nano.packing import Packer, Row
from tools.nano.probe import dense_labels
from tools.nano.scenes import SceneConfig, Thing, check_fonts, draw_scene
from tools.nano.scoring import Tally, count
from tools.nano.trainer import Recipe
from tools.nano.vocabulary import learn_ranks
from tools.nano.world import CHINESE, CHINESE_WORDS, COLOR_ID, COLORS, EMOJI, ENGLISH_WORDS, KIND_ID, SHAPES

pytestmark = pytest.mark.unit
CIRCLE = Thing("circle", "red", (0.1, 0.1, 0.3, 0.3))
CAT = Thing("cat", "emoji", (0.6, 0.5, 0.9, 0.8))
NUMBER = Thing("number", "plate", (0.3, 0.7, 0.5, 0.8), "407")
THINGS = [CIRCLE, NUMBER, CAT]


def answers(things: list[Thing], chinese: bool = False) -> dict[str, set[tuple[str, str]]]:
    """Every question and answer of some draws, by sort."""
    said: dict[str, set[tuple[str, str]]] = {}
    for seed in range(60):
        for turn in turns(np.random.default_rng(seed), things, chinese):
            said.setdefault(turn.sort, set()).add((turn.question, turn.answer))
    return said


def test_answers_are_right() -> None:
    said = answers(THINGS)
    assert {a for _, a in said["count"]} == {"3"}
    assert {a for _, a in said["number"]} == {"407"}
    assert {a for _, a in said["describe"]} == {"a red circle, the number 407 and a cat"}
    assert {a for _, a in said["color"]} == {"red"} and {a for _, a in said["shape"]} == {"circle"}
    assert all(("red circle" in q or "number" in q or "cat" in q) == (a == "yes") for q, a in said["exists"])
    relations = {question: after_boxes(answer) for question, answer in said["relation"]}
    assert relations["Is the red circle left or right of the cat?"] == "left"
    assert relations["Is the cat left or right of the red circle?"] == "right"
    assert relations["Is the red circle above or below the cat?"] == "above"
    assert relations["Is the number above or below the red circle?"] == "below"
    assert "Is the number above or below the cat?" not in relations, "too close to ask"


def test_boxes_are_in_qwens_own_form() -> None:
    assert grounded(CIRCLE) == "<ref>red circle</ref><box>(100,100),(300,300)</box>"
    assert grounded(CAT, chinese=True).startswith("<ref>猫</ref>")
    for _, answer in answers(THINGS)["caption"]:
        assert [box.label for box in parse_boxes(answer, strict=True)] == ["red circle", "number", "cat"]


def test_ambiguous_questions_are_not_asked() -> None:
    two_red = [CIRCLE, Thing("square", "red", (0.6, 0.1, 0.8, 0.3))]
    said = answers(two_red)
    assert "shape" not in said, "two things are red"
    two_circles = [CIRCLE, Thing("circle", "blue", (0.6, 0.1, 0.8, 0.3))]
    assert "color" not in answers(two_circles), "two things are circles"


def test_which_image_is_asked_only_of_what_one_shows() -> None:
    asked = about_two(np.random.default_rng(0), ([CIRCLE, NUMBER], [CAT, NUMBER]), chinese=False)
    which = {t.question: t.answer for t in asked if t.sort == "which"}
    expected = {"Which picture shows the red circle?": "Picture 1", "Which picture shows the cat?": "Picture 2"}
    assert which == expected


def test_everything_has_a_chinese_name_and_a_class() -> None:
    assert set(CHINESE) >= {*COLORS, *SHAPES, *EMOJI, "number", "word", "left", "right", "above", "below", "yes", "no"}
    assert set(KIND_ID) == {*SHAPES, *EMOJI, "number", "word"} and set(COLOR_ID) >= set(COLORS)
    assert len({*ENGLISH_WORDS, *CHINESE_WORDS}) == len(ENGLISH_WORDS) + len(CHINESE_WORDS)


def test_scores_count_what_they_say() -> None:
    tally = Tally()
    caption = turns(np.random.default_rng(0), THINGS)[0]
    count(
        tally,
        caption,
        grounded(CIRCLE) + "<ref>cat</ref><box>(0,0),(100,100)</box><ref>dog</ref><box>(0,0),(1,1)</box>",
    )
    assert tally.rates["caption: object recalled"] == pytest.approx(2 / 3)
    assert tally.rates["caption: box IoU >= 0.5"] == 0.5
    assert tally.rates["caption: name is right"] == pytest.approx(2 / 3)
    number = next(t for t in turns(np.random.default_rng(0), THINGS) if t.sort == "number")
    count(tally, number, "417")
    assert tally.rates["number: digit"] == pytest.approx(2 / 3) and tally.rates["number: whole"] == 0
    assert iou((0, 0, 10, 10), (0, 0, 10, 5)) == 0.5 and iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    assert grounded_boxes("<ref>a</ref><box>(1,2),(3,4)</box><ref>b</ref><box>(1,2)") == {"a": (1, 2, 3, 4)}


def test_labels_say_what_covers_a_cell() -> None:
    digits = Thing("number", "plate", (0.0, 0.0, 0.5, 0.25), "31", ((3, 0.0, 0.25), (1, 0.25, 0.5)))
    labels = dense_labels([digits], 4)
    assert labels.kind[0].tolist() == [KIND_ID["number"]] * 2 + [0, 0] and not labels.kind[1:].any()
    assert labels.digit[0].tolist() == [3, 1, -1, -1]
    assert labels.box[0, 0].tolist() == [0, 0, 0, 0, 5, 0, 2, 5]


def test_a_rows_weights_stand_where_the_answer_is_predicted() -> None:
    row = Row(length=20)
    row.start([1, 2, 3])
    row.add([4, 5], [6, 7], [2.0, 0.5])
    row.add([8], [9], [1.0])
    row.add([0] * 20, [0], [1.0])  # does not fit
    assert row.ids == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert row.weights == [0, 0, 0, 0, 2.0, 0.5, 0, 1.0, 0]
    assert row.positions == [0, 1, 2, 3, 4, 5, 6, 3, 4], "each dialogue follows the prefix"
    assert row.segments == [0, 0, 0, 1, 1, 1, 1, 2, 2]


def test_coordinates_weigh_by_place() -> None:
    config = ModelConfig.from_folder(NANO)
    tokenizer = Tokenizer.from_folder(NANO, config.visual.n_queries)
    packer = Packer(tokenizer, config, SceneConfig())
    answer = tokenizer.encode("<box>(7,45),(123,6)</box>")
    weights = dict(
        zip([tokenizer.decode([t]) + str(i) for i, t in enumerate(answer)], packer._weights(answer, "box"), strict=True)
    )
    assert [w for name, w in weights.items() if name[0].isdigit()] == [0.2, 1.0, 0.2, 1.5, 1.0, 0.2, 0.2]


def test_merges_are_the_most_frequent_pairs_and_the_same_each_time() -> None:
    text = "low low low lower newest newest"
    ranks = learn_ranks(text, 260)
    assert list(ranks)[256:] == list(learn_ranks(text, 260))[256:]
    assert {b"lo", b"low"} <= set(ranks)


def test_muon_directions_are_orthogonal() -> None:
    torch.manual_seed(0)
    for shape in ((2, 16, 16), (1, 8, 24), (1, 24, 8)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert ((values > 0.5) & (values < 1.3)).all(), "five steps bring singular values near one"


def test_the_schedule_warms_up_stays_and_falls() -> None:
    recipe = Recipe(warmup=10)
    assert recipe.rate_at(0.0, 5) == 0.5
    assert recipe.rate_at(0.4, 100) == 1.0
    assert recipe.rate_at(0.75, 100) == pytest.approx(0.5)
    assert recipe.rate_at(1.0, 100) == recipe.floor
    assert recipe.probe_at(0) == recipe.probe and recipe.probe_at(1) == pytest.approx(recipe.probe / 10)


def test_a_seed_names_a_scene() -> None:
    try:
        check_fonts()
    except SystemExit as missing:
        pytest.skip(str(missing))
    config = SceneConfig()
    first, second = (draw_scene(np.random.default_rng(4), config) for _ in range(2))
    assert (first[0] == second[0]).all() and first[1] == second[1]
    for seed in range(30):
        image, things = draw_scene(np.random.default_rng(seed), config)
        assert image.shape == (144, 144, 3) and image.dtype == np.uint8
        assert 1 <= len(things) <= config.most and len({t.name() for t in things}) == len(things)
        assert all(0 <= t.box[0] < t.box[2] <= 1 and 0 <= t.box[1] < t.box[3] <= 1 for t in things)


def test_scenes_are_conversations_as_qwen_vl_writes_them(tmp_path: Path) -> None:
    try:
        check_fonts()
    except SystemExit as missing:
        pytest.skip(str(missing))
    first, second, third = read_conversations(write_conversations(tmp_path / "own", 3, 144))
    assert (tmp_path / "own" / "2.png").is_file() and "0.png" in first.messages[0].text
    assert all(
        [message.role for message in talk.messages[:2]] == ["user", "assistant"] for talk in (first, second, third)
    )
    assert third.messages[0].text.isascii() is False and first.messages[0].text.isascii()
