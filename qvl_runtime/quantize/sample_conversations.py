"""Built-in conversations to calibrate on: drawn images with questions, and a few texts.

Image `n` is the same on every machine with the same Pillow: backgrounds, colored shapes, words and bars, alternately in
English and Chinese, in the formats of Qwen-VL's own tasks: grounded captions, boxes, counts, reading.
"""

from __future__ import annotations

import base64
import io
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qvl_runtime.prompt.listformat import box_text
from qvl_runtime.prompt.records import Conversation, Message

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

TEXTS = Path(__file__).parent.parent / "assets" / "calibration.json"
TEXT_EVERY = 4  # one conversation in four is text alone
SIDE = 448  # pixels
COLORS = {
    "red": ("红色", (210, 40, 45)),
    "green": ("绿色", (40, 150, 65)),
    "blue": ("蓝色", (40, 85, 205)),
    "yellow": ("黄色", (240, 215, 50)),
    "black": ("黑色", (25, 25, 28)),
    "white": ("白色", (245, 245, 245)),
    "orange": ("橙色", (240, 140, 30)),
    "purple": ("紫色", (135, 55, 165)),
}
SHAPES = {"circle": "圆形", "square": "方形", "triangle": "三角形", "diamond": "菱形"}
WORDS = ("OPEN", "Exit 12", "SALE 50%", "Room 204", "3.1416", "Hello", "No. 77", "TAXI", "2026-11-22", "42")


class _Shape(NamedTuple):
    """A drawn shape and its box on Qwen-VL's 0-1000 grid."""

    name: tuple[str, str]  # English, Chinese
    box: tuple[int, int, int, int]

    def grounded(self, chinese: bool) -> str:
        return f"<ref>{self.name[chinese]}</ref><box>{box_text(self.box)}</box>"


def sample_conversations(count: int) -> list[Conversation]:
    """The first `count` of a fixed, endless list."""
    texts = json.loads(TEXTS.read_text(encoding="utf-8"))
    conversations = []
    for number in range(count):
        where = f"built-in conversation {number + 1}"
        if number % TEXT_EVERY == TEXT_EVERY - 1:
            text = texts[number // TEXT_EVERY % len(texts)]
            turns = [Message("user", text["question"]), Message("assistant", text["answer"])]
        else:
            turns = _about_an_image(random.Random(number), chinese=number % 2 == 1)
        conversations.append(Conversation(where, tuple(turns)))
    return conversations


def _about_an_image(rng: random.Random, chinese: bool) -> list[Message]:
    image, shapes, word, bars = _draw(rng)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)  # five times as fast, and not stored
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    captions = "".join(shape.grounded(chinese) for shape in shapes)
    target = rng.choice(shapes)
    tasks = {
        "caption": ("Generate the caption in English with grounding:", "用中文描述图片并框出物体:", captions),
        "box": (f"Box the {target.name[0]}.", f"框出图中的{target.name[1]}", target.grounded(chinese)),
        "count": ("How many shapes are there?", "图中有几个图形?", str(len(shapes))),
        "read": ("What is written in the picture?", "图中写的是什么?", word),
        "bars": (
            "Which bar is the highest, and how high is it?",
            "哪一根柱子最高?有多高?",
            f"{1 + bars.index(max(bars))}: {max(bars)}" if bars else "",
        ),
        "describe": (
            "Describe the picture.",
            "描述这张图片",
            ("、" if chinese else ", ").join(shape.name[chinese] for shape in shapes) + f", {word}",
        ),
    }
    chosen = rng.sample([task for task in tasks if tasks[task][2]], 3)
    turns = []
    for number, task in enumerate(chosen):
        # With the space of published files: calibrations that are cited or saved have this text.
        heading = f"Picture 1: <img>{url}</img>\n" if number == 0 else ""
        turns += [Message("user", heading + tasks[task][chinese]), Message("assistant", tasks[task][2])]
    return turns


def _draw(rng: random.Random) -> tuple[Image.Image, list[_Shape], str, list[int]]:
    """An image with its shapes, the word in it, and the heights of its bars, which may be none."""
    from PIL import ImageDraw, ImageFont

    image = _background(rng)
    pen = ImageDraw.Draw(image)
    cells = rng.sample([(column, row) for column in range(3) for row in range(2)], rng.randint(1, 4))
    shapes = [_draw_shape(rng, pen, *cell) for cell in cells]
    word = rng.choice(WORDS)
    ink, paper = rng.sample([(20, 20, 20), (250, 250, 250), (20, 60, 160), (250, 230, 120)], 2)
    font = ImageFont.load_default(rng.randint(28, 48))
    position = (rng.randint(10, 60), 335 + rng.randint(0, 40))
    left, top, right, bottom = pen.textbbox(position, word, font=font)
    pen.rectangle((left - 8, top - 6, right + 8, bottom + 6), fill=paper)
    pen.text(position, word, fill=ink, font=font)
    bars = [rng.randint(1, 9) for _ in range(rng.randint(3, 5))] if rng.random() < 0.4 else []
    for number, height in enumerate(bars):
        pen.rectangle((300 + 28 * number, 440 - 10 * height, 320 + 28 * number, 440), fill=(90, 90, 200))
    return image, shapes, word, bars


def _background(rng: random.Random) -> Image.Image:
    """A gradient with some noise: no area of a photo is perfectly even."""
    from PIL import Image

    one, other = ((rng.randint(60, 255), rng.randint(60, 255), rng.randint(60, 255)) for _ in range(2))
    ramp = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize((SIDE, SIDE))
    ground = Image.composite(Image.new("RGB", (SIDE, SIDE), one), Image.new("RGB", (SIDE, SIDE), other), ramp)
    grain = Image.frombytes("L", (SIDE // 4, SIDE // 4), rng.randbytes((SIDE // 4) ** 2)).resize((SIDE, SIDE))
    return Image.blend(ground, grain.convert("RGB"), rng.uniform(0.02, 0.2))


def _draw_shape(rng: random.Random, pen: ImageDraw.ImageDraw, column: int, row: int) -> _Shape:
    kind, color = rng.choice(list(SHAPES)), rng.choice(list(COLORS))
    size = rng.randint(70, 120)
    x, y = 149 * column + rng.randint(4, 145 - size), 160 * row + rng.randint(4, 155 - size)
    corners: dict[str, list[tuple[float, float]]] = {
        "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
        "triangle": [(0.5, 0), (1, 1), (0, 1)],
        "diamond": [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)],
    }
    chinese, rgb = COLORS[color]
    if kind == "circle":
        pen.ellipse((x, y, x + size, y + size), fill=rgb)
    else:
        pen.polygon([(x + size * u, y + size * v) for u, v in corners[kind]], fill=rgb)
    x1, y1, x2, y2 = (1000 * v // SIDE for v in (x, y, x + size, y + size))
    return _Shape((f"{color} {kind}", f"{chinese}{SHAPES[kind]}"), (x1, y1, x2, y2))
