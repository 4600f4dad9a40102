from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from qvl_runtime.errors import ConfigError
from qvl_runtime.prompt import fonts
from qvl_runtime.prompt.boxes import Box, parse_boxes
from qvl_runtime.prompt.drawing import PALETTE, draw_boxes

GROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "gray": (128, 128, 128)}
LEFT, RIGHT = (100, 300, 400, 700), (550, 300, 900, 700)


@pytest.fixture
def no_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "installed_fonts", lambda: ())


@pytest.fixture
def chinese_font() -> Path:
    for path in fonts.installed_fonts():
        if not fonts.missing_glyphs(fonts.open_font(path, 20), "猫"):
            return path
    pytest.skip("no installed font has Chinese glyphs: apt install fonts-noto-cjk")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A drawing that warns without being asked fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def colors(image: Image.Image) -> set[tuple[int, ...]]:
    return {color for _, color in image.getcolors(image.width * image.height)}  # type: ignore[misc, union-attr]


@pytest.mark.parametrize("ground", GROUNDS)
def test_the_outline_is_where_the_box_is(ground: str) -> None:
    image = Image.new("RGB", (400, 300), ground)
    drawn = np.asarray(draw_boxes(image, [Box(None, *LEFT)]))
    changed = np.argwhere((drawn != np.array(GROUNDS[ground])).any(axis=2))
    (top, left), (bottom, right) = changed.min(axis=0), changed.max(axis=0)
    for measured, exact in ((left, 40), (top, 90), (right, 160), (bottom, 210)):
        assert abs(measured - exact) <= 3, "half a line and its rim"
    assert (drawn[150, 100] == GROUNDS[ground]).all(), "the inside stays as it is"
    assert np.asarray(image).min() == np.asarray(image).max(), "the image itself is not drawn on"


@pytest.mark.parametrize("ground", GROUNDS)
@pytest.mark.parametrize("number", range(len(PALETTE)))
def test_tags_can_be_read(ground: str, number: int) -> None:
    """Text against its tag: a contrast ratio of at least 3, which WCAG 2 asks of large text."""
    image = Image.new("RGB", (400, 300), ground)
    labels = [Box(f"n{index}", 0, 0, 1, 1) for index in range(number)]
    drawn = draw_boxes(image, [*labels, Box("label", *LEFT)])
    tag = PALETTE[number]
    assert tag in colors(drawn)
    crop = np.asarray(drawn)[65:90, 38:100].reshape(-1, 3)
    inks = [ink for ink in ((0, 0, 0), (255, 255, 255)) if (crop == ink).all(axis=1).sum() > 20]
    assert any(contrast(tag, ink) >= 3 for ink in inks)


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """WCAG 2 contrast ratio, 1 to 21."""
    values = []
    for color in (one, other):
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in color)]
        values.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(values) + 0.05) / (min(values) + 0.05)


def test_a_label_has_one_color_and_others_have_others() -> None:
    image = Image.new("RGB", (400, 300), "white")
    same = draw_boxes(image, [Box("cat", *LEFT), Box("cat", *RIGHT)])
    two = draw_boxes(image, [Box("cat", *LEFT), Box("dog", *RIGHT)])
    unnamed = draw_boxes(image, [Box(None, *LEFT), Box(None, *RIGHT)])
    assert PALETTE[0] in colors(same) and PALETTE[1] not in colors(same)
    for drawn in (two, unnamed):
        assert {PALETTE[0], PALETTE[1]} <= colors(drawn)
    assert len(set(PALETTE)) == len(PALETTE) == 12


def test_chinese_labels_use_a_font_that_has_them(chinese_font: Path) -> None:
    font, lacking = fonts.pick_font("框出图中的狗 dog", 24)
    assert lacking == ""
    assert isinstance(font, ImageFont.FreeTypeFont)
    image = Image.new("RGB", (400, 300), "white")
    cat, dog = (draw_boxes(image, [Box(label, *LEFT)]) for label in ("猫", "狗"))
    assert np.asarray(cat).tobytes() != np.asarray(dog).tobytes(), "two boxes of a missing glyph would be the same"
    by_name = draw_boxes(image, [Box("猫", *LEFT)], font=chinese_font)
    assert np.asarray(by_name).any()


def test_without_a_font_the_number_is_drawn_and_said(no_fonts: None) -> None:
    image = Image.new("RGB", (400, 300), "white")
    with pytest.warns(UserWarning, match="no font here has the glyphs '狗'.*drawn as '2'.*fonts-noto-cjk"):
        drawn = draw_boxes(image, [Box("cat", *LEFT), Box("狗", *RIGHT)])
    assert np.array_equal(np.asarray(drawn), np.asarray(draw_boxes(image, [Box("cat", *LEFT), Box("2", *RIGHT)])))


def test_without_a_font_what_is_left_of_a_label_is_drawn(no_fonts: None) -> None:
    image = Image.new("RGB", (400, 300), "white")
    with pytest.warns(UserWarning, match="drawn as 'a dog'"):
        drawn = draw_boxes(image, [Box("a 狗 dog", *LEFT)])
    assert np.array_equal(np.asarray(drawn), np.asarray(draw_boxes(image, [Box("a dog", *LEFT)])))


def test_a_font_of_the_callers(tmp_path: Path) -> None:
    image = Image.new("RGB", (400, 300), "white")
    draw_boxes(image, [Box("cat", *LEFT)], font=ImageFont.load_default(30))
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    for name in ("broken.ttf", "missing.ttf", "missing.ttc"):
        with pytest.raises(ConfigError, match=f"{name} cannot be opened"):
            draw_boxes(image, [Box("cat", *LEFT)], font=tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_font_that_is_a_named_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.ttf")
    with pytest.raises(ConfigError, match=r"pipe.ttf is a named pipe; expected a file"):
        fonts.open_font(tmp_path / "pipe.ttf", 20)
    with pytest.raises(ConfigError, match=r"is a folder; expected a file"):
        fonts.open_font(tmp_path, 20)


def test_tags_stay_inside_and_apart() -> None:
    image = Image.new("RGB", (300, 200), "white")
    boxes = [Box(f"label {index}", 0, 0, 1000, 1000) for index in range(4)] + [Box("corner", 990, 990, 1000, 1000)]
    drawn = colors(draw_boxes(image, boxes))
    assert set(PALETTE[:5]) <= drawn, "no tag hides another"


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_any_mode_becomes_rgb(mode: str) -> None:
    drawn = draw_boxes(Image.new(mode, (50, 40)), parse_boxes("<ref>x</ref><box>(1,2),(999,999)</box>"))
    assert (drawn.mode, drawn.size) == ("RGB", (50, 40))


def test_odd_images_and_quads() -> None:
    quad = parse_boxes("<ref>sign</ref><quad>(100,100),(900,300),(800,900),(50,700)</quad>")
    for size in ((1, 1), (1000, 3), (3, 1000)):
        assert draw_boxes(Image.new("RGB", size), quad).size == size
    drawn = np.asarray(draw_boxes(Image.new("RGB", (200, 200)), quad))
    assert drawn[20, 20].any() and drawn[60, 180].any(), "corners are where the quad has them"
    assert not drawn[20, 180].any(), "not where its bounding box would"
    assert draw_boxes(Image.new("RGB", (9, 9)), []).getpixel((4, 4)) == (0, 0, 0)
