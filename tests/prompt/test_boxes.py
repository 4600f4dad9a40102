from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl_runtime.errors import PromptError
from qvl_runtime.prompt.boxes import Box, parse_boxes


class TestBox:
    def test_pixels_are_per_mille_of_the_original_rounded_down(self) -> None:
        assert Box("dog", 536, 509, 588, 602).pixels(1024, 683) == (548, 347, 602, 411)
        assert Box(None, 0, 0, 1000, 1000).pixels(236, 196) == (0, 0, 236, 196)

    def test_corners_run_clockwise(self) -> None:
        assert Box(None, 0, 100, 500, 1000).corners(100, 10) == [(0, 1), (50, 1), (50, 10), (0, 10)]

    @pytest.mark.parametrize("corners", [(5, 0, 4, 9), (0, 9, 9, 8), (-1, 0, 1, 1), (0, 0, 1001, 1)])
    def test_only_rectangles_in_the_image(self, corners: tuple[int, int, int, int]) -> None:
        with pytest.raises(PromptError, match="not a rectangle"):
            Box("x", *corners)


class TestTolerant:
    @pytest.mark.parametrize(
        ("content", "corners"),
        [
            ("(1,2),(3,4)", (1, 2, 3, 4)),
            ("( 1 , 2 ),\n( 3 , 4 )", (1, 2, 3, 4)),
            ("（１,２），（３,４）", (1, 2, 3, 4)),
            ("(1.9,2),(3,4)", (1, 2, 3, 4)),
            ("1,2,3,4", (1, 2, 3, 4)),
            ("(9,8),(1,0)", (1, 0, 9, 8)),
            ("(-1,2),(3000,4)", (0, 2, 1000, 4)),
            ("(1,2),(3," + "9" * 5000 + ")", (1, 2, 3, 1000)),
        ],
    )
    def test_reads(self, content: str, corners: tuple[int, int, int, int]) -> None:
        assert parse_boxes(f"<box>{content}</box>") == [Box(None, *corners)]

    @pytest.mark.parametrize("content", ["", "(1,2),(3", "(1,2),(3,4),(5,6)", "(a,b),(c,d)", "x1=1,y1=2,3,4", "(1,2)"])
    def test_leaves_out(self, content: str) -> None:
        assert parse_boxes(f"<box>{content}</box><box>(1,2),(3,4)</box>") == [Box(None, 1, 2, 3, 4)]

    @pytest.mark.parametrize(
        "text",
        [
            "<ref>cat</ref><box>(1,2),(3,4)",
            "<ref>cat</ref><box>(1,2),(3,4) and 5 more",
            "<ref>cat</ref><box>(1,2),(3,4)<box>(5,",
            "<ref>cat<box>(1,2),(3,4)</box>",
            "<ref>cat</ref><box>(1,2),(3,4)</box></box></ref>",
        ],
    )
    def test_unclosed_and_stray_tags(self, text: str) -> None:
        assert parse_boxes(text) == [Box("cat", 1, 2, 3, 4)]

    def test_a_label_holds_for_every_box_up_to_the_next(self) -> None:
        cat = "<ref> the 猫 </ref>的位置<box>(1,2),(3,4)</box>\n<box>(5,6),(7,8)</box>"
        text = cat + "<ref>狗</ref><box>(0,0),(9,9)</box>"
        assert [box.label for box in parse_boxes(text)] == ["the 猫", "the 猫", "狗"]

    def test_a_box_before_any_label_has_none(self) -> None:
        text = "<box>(1,2),(3,4)</box><ref>late</ref><ref></ref><box>(5,6),(7,8)</box>"
        assert [box.label for box in parse_boxes(text)] == [None, None]

    def test_a_runaway_repetition_counts_once(self) -> None:
        text = "<ref>a</ref>" + "<box>(1,2),(3,4)</box>" * 500 + "<ref>b</ref><box>(1,2),(3,4)</box>"
        assert [box.label for box in parse_boxes(text)] == ["a", "b"]

    def test_a_quad_keeps_its_corners(self) -> None:
        (box,) = parse_boxes("<quad>(60,40),(90,50),(85,90),(56,80)</quad>", image_index=1)
        assert (box.x1, box.y1, box.x2, box.y2, box.image_index) == (56, 40, 90, 90, 1)
        assert box.corners(1000, 1000) == [(60, 40), (90, 50), (85, 90), (56, 80)]

    def test_text_without_boxes(self) -> None:
        assert parse_boxes("") == parse_boxes("nothing <here>") == []

    @settings(deadline=None)
    @given(st.text("<>/()refboxquad,0123456789 ", max_size=80))
    def test_never_raises(self, text: str) -> None:
        parse_boxes(text)

    @settings(deadline=None)
    @given(st.text("<>/()refbox,01 ", max_size=30))
    def test_a_prefix_never_loses_an_earlier_box(self, tail: str) -> None:
        head = "<ref>a</ref><box>(1,2),(3,4)</box>"
        assert parse_boxes(head + tail)[0] == Box("a", 1, 2, 3, 4)


class TestStrict:
    def test_reads_what_the_model_was_taught(self) -> None:
        text = "<ref>dog</ref><box>(1,2),(3,4)</box><box>(1,2),(3,4)</box><quad>(0,0),(9,0),(9,9),(0,9)</quad>"
        boxes = parse_boxes(text, strict=True)
        assert [(box.label, box.x2) for box in boxes] == [("dog", 3), ("dog", 3), ("dog", 9)]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("<box>(1,2),(3,4)", "has no matching tag"),
            ("<ref>open <box>(1,2),(3,4)</box>", "has no matching tag"),
            ("(1,2)</box>", "has no matching tag"),
            ("<box></box>", "is malformed"),
            ("<box>(1,2),(3,4),(5,6)</box>", "is malformed"),
            ("<box>( 1,2),(3,4)</box>", "is malformed"),
            ("<box>(１,2),(3,4)</box>", "is malformed"),
            ("<box>(1.5,2),(3,4)</box>", "is malformed"),
            ("<quad>(1,2),(3,4)</quad>", "is malformed"),
            ("<box>(9,8),(1,0)</box>", "not a rectangle"),
            ("<box>(1,2),(3000,4)</box>", "not a rectangle"),
            ("<box>(1,2),(3," + "9" * 5000 + ")</box>", "not a rectangle"),
        ],
    )
    def test_raises(self, text: str, message: str) -> None:
        with pytest.raises(PromptError, match=message) as caught:
            parse_boxes(text, strict=True)
        assert "\n" not in str(caught.value)
