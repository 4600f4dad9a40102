"""Scenes: the images that nano is trained and tested on, drawn from one numpy Generator, so that a seed names a scene.

A scene is a square RGB image with one to three things on a plain, gradient, striped or noisy background. A thing is a
colored shape, an emoji or a plate that carries a number or a short word. Names are unique within an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFont

from .world import CHINESE, CHINESE_WORDS, COLORS, EMOJI, ENGLISH_WORDS, NEW_EMOJI, SHAPES

EMOJI_FONT = "NotoColorEmoji.ttf"
LATIN_FONTS = ["DejaVuSans-Bold.ttf", "DejaVuSans.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSerif-Bold.ttf"]
CHINESE_FONTS = ["NotoSansCJK-Bold.ttc", "NotoSerifCJK-Bold.ttc", "wqy-microhei.ttc"]
DEBIAN_FONTS = "fonts-dejavu fonts-noto-color-emoji fonts-noto-cjk fonts-wqy-microhei"


@dataclass(frozen=True, slots=True)
class SceneConfig:
    """side: pixels of the square image; least, most: things; small, large: size of a thing as a share of the side."""

    side: int = 144
    least: int = 1
    most: int = 3
    small: float = 0.22
    large: float = 0.45
    emoji: float = 0.4  # share of objects that are emoji
    plate: float = 0.55  # share of images with a plate
    fine: float = 0.3  # share of images drawn at twice the size and resized, as a user's image would be
    new: float = 0.0  # share of objects that are of `new_kind`
    new_kind: str = "sun hat"  # one of `NEW_EMOJI`


@dataclass(frozen=True, slots=True)
class Thing:
    """A thing of a scene, with its place and its text."""

    kind: str  # a shape, an emoji's name, "number" or "word"
    color: str  # a color, "emoji" or "plate"
    box: tuple[float, float, float, float]  # x1, y1, x2, y2 as shares of the side
    text: str = ""  # what a plate says
    glyphs: tuple[tuple[int, float, float], ...] = ()  # (digit, x1, x2), shares of the side

    def name(self, chinese: bool = False) -> str:
        """What it is called: "red circle", "cat", "number"; 红色圆形, 猫, 数字."""
        words = [self.color, self.kind] if self.color in COLORS else [self.kind]
        return "".join(CHINESE[w] for w in words) if chinese else " ".join(words)

    def box_1000(self) -> tuple[int, int, int, int]:
        """The box in Qwen-VL's coordinates, 0 to 999."""
        x1, y1, x2, y2 = (min(999, int(v * 1000)) for v in self.box)
        return x1, y1, x2, y2

    @property
    def center(self) -> tuple[float, float]:
        """x and y of the middle of the box, as shares of the side."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


class Sprite(NamedTuple):
    """A thing not yet placed: paint RGB and mask L (or None for a full rectangle), glyphs in pixels."""

    kind: str
    color: str
    paint: Image.Image
    mask: Image.Image | None
    text: str = ""
    glyphs: tuple[tuple[int, float, float], ...] = ()


SpriteMaker = Callable[[Generator, SceneConfig, list[str]], Sprite]  # rng, config, colors to choose from


def check_fonts() -> None:
    """Raise with the way out where a font that the scenes need is not installed."""
    for name in [EMOJI_FONT, *LATIN_FONTS, *CHINESE_FONTS]:
        try:
            ImageFont.truetype(name, 109)
        except OSError:
            raise SystemExit(f"font {name} is not installed; on Debian: apt-get install {DEBIAN_FONTS}") from None


def draw_scene(rng: Generator, config: SceneConfig) -> tuple[np.ndarray, list[Thing]]:
    """One scene: uint8 [side, side, 3] and its things, sorted left to right by their centers. Never empty."""
    scale = 2 if rng.random() < config.fine else 1
    drawn = replace(config, side=config.side * scale)
    things: list[Thing] = []
    while not things:
        image, things = _compose(rng, drawn)
    if scale > 1:
        image = image.resize((config.side, config.side), Image.Resampling.BICUBIC)
    noisy = np.asarray(image, dtype=np.int16) + rng.integers(-5, 6, (config.side, config.side, 1), dtype=np.int16)
    return np.clip(noisy, 0, 255).astype(np.uint8), things


def _compose(rng: Generator, config: SceneConfig) -> tuple[Image.Image, list[Thing]]:
    side = config.side
    ground, base = _ground(rng, side)
    canvas = Image.fromarray(ground)
    colors = [c for c, rgb in COLORS.items() if np.abs(np.array(rgb) - base).max() > 70]
    makers: list[SpriteMaker] = [_object] * int(rng.integers(config.least, config.most + 1))
    if rng.random() < config.plate:
        makers[0] = _plate  # plates are the widest: place them first
    taken: list[tuple[int, int, int, int]] = []
    things: list[Thing] = []
    for make in makers:
        for _ in range(20):
            sprite = make(rng, config, colors)
            w, h = sprite.paint.size
            if w >= side - 2 or h >= side - 2 or any((t.kind, t.color) == sprite[:2] for t in things):
                continue
            x, y = int(rng.integers(1, side - w)), int(rng.integers(1, side - h))
            gap = side // 48
            if any(x < b[2] + gap and b[0] < x + w + gap and y < b[3] + gap and b[1] < y + h + gap for b in taken):
                continue
            canvas.paste(sprite.paint, (x, y), sprite.mask)
            taken.append((x, y, x + w, y + h))
            things.append(_placed(sprite, taken[-1], side))
            break
    things.sort(key=lambda t: t.center)
    return canvas, things


def _placed(sprite: Sprite, box: tuple[int, int, int, int], side: int) -> Thing:
    glyphs = tuple((d, (box[0] + a) / side, (box[0] + b) / side) for d, a, b in sprite.glyphs)
    x1, y1, x2, y2 = (v / side for v in box)
    return Thing(sprite.kind, sprite.color, (x1, y1, x2, y2), sprite.text, glyphs)


def _ground(rng: Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    base = rng.uniform(90, 225) + rng.uniform(-38, 38, 3)
    style = rng.integers(4)
    image = np.broadcast_to(base, (side, side, 3)).astype(np.float32)
    ramp = np.linspace(-1, 1, side, dtype=np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    slope = np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None]
    if style == 1:
        image = image + slope[..., None] * rng.uniform(-32, 32, 3)
    elif style == 2:
        image = image + np.sign(np.sin(slope * rng.uniform(8, 40)))[..., None] * rng.uniform(4, 14)
    elif style == 3:
        cells = Image.fromarray(rng.normal(0, 12, (9, 9)).astype(np.float32))
        image = image + np.asarray(cells.resize((side, side), Image.Resampling.BICUBIC))[..., None]
    return np.clip(image, 0, 255).astype(np.uint8), base


def _object(rng: Generator, config: SceneConfig, colors: list[str]) -> Sprite:
    size = int(config.side * rng.uniform(config.small, config.large))
    new = config.new > 0 and rng.random() < config.new
    if new or rng.random() < config.emoji:
        kinds = [config.new_kind] if new else list(EMOJI)
        kind = kinds[rng.integers(len(kinds))]
        glyph = _emoji(kind)
        k = size / max(glyph.size)
        glyph = glyph.resize(
            (max(4, round(glyph.width * k)), max(4, round(glyph.height * k))), Image.Resampling.BILINEAR
        )
        return Sprite(kind, "emoji", glyph.convert("RGB"), glyph.getchannel("A"))
    kind, color = SHAPES[rng.integers(len(SHAPES))], colors[rng.integers(len(colors))]
    w, h = size, int(size * rng.uniform(0.8, 1.0))
    if rng.random() < 0.5:
        w, h = h, w
    mask = Image.new("L", (4 * w, 4 * h))
    pen = ImageDraw.Draw(mask)
    if kind == "circle":
        pen.ellipse((0, 0, 4 * w - 1, 4 * h - 1), fill=255)
    else:
        corners = _corners(kind, rng)
        corners = (corners - corners.min(0)) / (corners.max(0) - corners.min(0)) * (4 * w - 1, 4 * h - 1)
        pen.polygon([(float(x), float(y)) for x, y in corners], fill=255)
    r, g, b = (int(v) for v in np.clip(np.array(COLORS[color]) + rng.normal(0, 9, 3), 0, 255))
    return Sprite(kind, color, Image.new("RGB", (w, h), (r, g, b)), mask.reduce(4))


def _corners(kind: str, rng: Generator) -> np.ndarray:
    """Vertices [n, 2] of a shape of any size, slightly turned."""
    turn = 0.0
    if kind == "square":
        points = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    elif kind == "diamond":
        points = np.array([[0, -1], [0.8, 0], [0, 1], [-0.8, 0]])
    elif kind == "triangle":
        points, turn = np.array([[0, -1], [1, 0.9], [-1, 0.9]]), rng.uniform(-0.2, 0.2)
    elif kind == "cross":
        a = 0.36
        quarter = np.array([[-a, -1], [a, -1], [a, -a]])
        turns = [np.array([[np.cos(t), np.sin(t)], [-np.sin(t), np.cos(t)]]) for t in np.arange(4) * np.pi / 2]
        points, turn = np.concatenate([quarter @ t for t in turns]), rng.uniform(-0.2, 0.2)
    else:
        k = np.arange(10)
        radius = np.where(k % 2 == 0, 1.0, 0.42)
        points = np.stack([radius * np.sin(k * np.pi / 5), -radius * np.cos(k * np.pi / 5)], 1)
        turn = rng.uniform(-0.3, 0.3)
    rotated: np.ndarray = points @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    return rotated


def _plate(rng: Generator, config: SceneConfig, _: list[str]) -> Sprite:
    kind, chinese = "number", False
    if rng.random() < 0.6:
        text = "".join(str(v) for v in rng.integers(0, 10, int(rng.integers(2, 5))))
    else:
        kind, chinese = "word", bool(rng.random() < 0.4)
        words = CHINESE_WORDS if chinese else ENGLISH_WORDS
        text = words[rng.integers(len(words))]
    fonts = CHINESE_FONTS if chinese else LATIN_FONTS
    name, size = fonts[rng.integers(len(fonts))], int(config.side * rng.uniform(0.17, 0.25))
    size = min(size, int(size * 0.62 * config.side / _font(name, size).getlength(text)))
    font = _font(name, size)
    left, top, right, bottom = font.getbbox(text)
    pad = int(rng.integers(3, 6)) * config.side // 144
    ink, ground = rng.integers(0, 60, 3), rng.integers(200, 256, 3)
    if rng.random() < 0.5:
        ink, ground = ground, ink
    paint = Image.new("RGB", (round(right - left) + 2 * pad, round(bottom - top) + 2 * pad), tuple(map(int, ground)))
    ImageDraw.Draw(paint).text((pad - left, pad - top), text, font=font, fill=tuple(map(int, ink)))
    edges = [pad - left + font.getlength(text[:k]) for k in range(len(text) + 1)]
    digits = tuple((int(c), edges[k], edges[k + 1]) for k, c in enumerate(text)) if kind == "number" else ()
    return Sprite(kind, "plate", paint, None, text, digits)


@cache
def _emoji(name: str) -> Image.Image:
    image = Image.new("RGBA", (136, 128))
    glyph, font = {**EMOJI, **NEW_EMOJI}[name], ImageFont.truetype(EMOJI_FONT, 109)
    ImageDraw.Draw(image).text((0, 0), glyph, font=font, embedded_color=True)
    return image.crop(image.getbbox())


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(name, size)
