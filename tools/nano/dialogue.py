"""Unambiguous questions about a scene and their answers, in Qwen-VL's own formats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from numpy.random import Generator

from .scenes import Thing
from .world import CHINESE, COLORS, SHAPES

T = TypeVar("T")
APART = 0.12  # no question about two things whose centers are closer than this share of the side
GREETINGS = [
    ("Hello!", "Hello! Show me a picture."),
    ("Hi", "Hello! Show me a picture."),
    ("Who are you?", "I am nano, a tiny Qwen-VL. Show me a picture."),
    ("What can you do?", "I can describe a picture, box things, count, and read numbers and short words."),
    ("Thank you!", "You are welcome."),
    ("你好", "你好!给我看一张图片吧。"),
    ("你是谁?", "我是 nano,一个很小的 Qwen-VL。给我看一张图片吧。"),
    ("你能做什么?", "我能描述图片、框出物体、数数,还能读数字和文字。"),
    ("谢谢", "不客气。"),
]


class Turn(NamedTuple):
    """A question about a scene and its right answer."""

    sort: str  # caption, describe, box, count, color, shape, relation, exists, number, word, which, other
    question: str
    answer: str


def grounded(thing: Thing, chinese: bool = False) -> str:
    """`<ref>red circle</ref><box>(x1,y1),(x2,y2)</box>`."""
    x1, y1, x2, y2 = thing.box_1000()
    return f"<ref>{thing.name(chinese)}</ref><box>({x1},{y1}),({x2},{y2})</box>"


def turns(rng: Generator, things: list[Thing], chinese: bool = False) -> list[Turn]:
    """A draw of every sort of question that this scene answers."""

    def word(english: str) -> str:
        return CHINESE[english] if chinese else english

    out = [
        Turn("caption", *_pick(rng, CAPTIONS[chinese]), "".join(grounded(t, chinese) for t in things)),
        Turn("describe", *_pick(rng, DESCRIBE[chinese]), _sentence(things, chinese)),
        Turn("count", *_pick(rng, COUNT[chinese]), str(len(things))),
    ]
    thing = _choose(rng, things)
    out.append(Turn("box", *_pick(rng, BOX[chinese], thing.name(chinese)), grounded(thing, chinese)))
    shapes = [t for t in things if t.color in COLORS]
    for t in shapes:
        if sum(u.kind == t.kind for u in shapes) == 1:
            out.append(Turn("color", *_pick(rng, COLOR[chinese], word(t.kind)), word(t.color)))
        if sum(u.color == t.color for u in shapes) == 1:
            out.append(Turn("shape", *_pick(rng, SHAPE[chinese], word(t.color)), word(t.kind)))
    out += relations(rng, things, chinese)
    name, there = _asked_for(rng, things, chinese)
    out.append(Turn("exists", *_pick(rng, EXISTS[chinese], name), word("yes" if there else "no")))
    for t in things:
        if t.text:
            out.append(Turn(t.kind, *_pick(rng, READ[t.kind][chinese]), t.text))
    return out


def relations(rng: Generator, things: list[Thing], chinese: bool) -> list[Turn]:
    """Left or right, or above or below, of two things that are clearly apart, if there are two.

    The answer is grounded: both boxes, in the order asked, and then the word. A direct answer stayed at chance for
    35,000 pictures; comparing numbers that it has written down is something so small a decoder can learn.
    """
    if len(things) < 2:
        return []
    axis = int(rng.integers(2))
    first, second = (things[int(i)] for i in rng.permutation(len(things))[:2])
    apart = first.center[axis] - second.center[axis]
    if abs(apart) < APART:
        return []
    word = (("left", "right"), ("above", "below"))[axis][apart > 0]
    question = RELATION[axis][chinese].format(first.name(chinese), second.name(chinese))
    boxes = grounded(first, chinese) + grounded(second, chinese)
    return [Turn("relation", question, boxes + (CHINESE[word] if chinese else word))]


def about_two(rng: Generator, pair: Sequence[list[Thing]], chinese: bool) -> list[Turn]:
    """Questions about a prompt with two images, each of which names the image or asks for it."""
    out: list[Turn] = []
    for k, things in enumerate(pair):
        other = {t.name() for t in pair[1 - k]}
        where = f"图{k + 1}" if chinese else f"Picture {k + 1}"
        out.append(
            Turn("other", f"{where}中有几个物体?" if chinese else f"How many things are in {where}?", str(len(things)))
        )
        for t in things:
            if t.text:
                ask = f"{where}写的是什么?" if chinese else f"What does {where} say?"
                out.append(Turn("other", ask, t.text))
            if t.name() not in other:
                name = t.name(chinese)
                ask = f"哪张图里有{name}?" if chinese else f"Which picture shows the {name}?"
                out.append(Turn("which", ask, where))
                ask = f"框出{where}中的{name}" if chinese else f"Box the {name} in {where}."
                out.append(Turn("box", ask, grounded(t, chinese)))
        out.append(Turn("describe", f"描述{where}" if chinese else f"Describe {where}.", _sentence(things, chinese)))
    return out


CAPTIONS = {False: ["Generate the caption in English with grounding:"], True: ["用中文描述图片并框出物体:"]}
DESCRIBE = {False: ["Describe the picture.", "What is in the picture?"], True: ["描述这张图片", "图中有什么?"]}
COUNT = {False: ["How many things are there?"], True: ["图中有几个物体?"]}
BOX = {False: ["Box the {}.", "Find the {}."], True: ["框出图中的{}"]}
COLOR = {False: ["What colour is the {}?", "What color is the {}?"], True: ["{}是什么颜色?"]}
SHAPE = {False: ["What shape is the {} thing?"], True: ["{}的是什么形状?"]}
EXISTS = {False: ["Is there a {}?"], True: ["图中有{}吗?"]}
READ = {
    "number": {False: ["What is the number?", "What does it say?"], True: ["图中的数字是多少?", "上面写的是什么?"]},
    "word": {False: ["What is the word?", "What does it say?"], True: ["图中的文字是什么?", "上面写的是什么?"]},
}
RELATION = (
    {False: "Is the {} left or right of the {}?", True: "{}在{}的左边还是右边?"},
    {False: "Is the {} above or below the {}?", True: "{}在{}的上边还是下边?"},
)


def _sentence(things: list[Thing], chinese: bool) -> str:
    """ "a red circle, a cat and the number 42"; 红色圆形、猫和数字42."""

    def phrase(t: Thing) -> str:
        if chinese:
            return t.name(True) + t.text
        if t.text:
            return f"the {t.kind} {t.text}"
        return f"{'an' if t.name()[0] in 'aeiou' else 'a'} {t.name()}"

    phrases = [phrase(t) for t in things]
    comma, last = ("、", "和") if chinese else (", ", " and ")
    return last.join([comma.join(phrases[:-1]), phrases[-1]]) if len(phrases) > 1 else phrases[0]


def _asked_for(rng: Generator, things: list[Thing], chinese: bool) -> tuple[str, bool]:
    """A name to ask for: half the time of something present, else a near miss (one attribute changed)."""
    shapes = [t for t in things if t.color in COLORS]
    if rng.random() < 0.5 or not shapes:
        return _choose(rng, things).name(chinese), True
    t = _choose(rng, shapes)
    color, kind = (_choose(rng, list(COLORS)), t.kind) if rng.random() < 0.5 else (t.color, _choose(rng, SHAPES))
    name = Thing(kind, color, t.box).name(chinese)
    return name, any(u.name(chinese) == name for u in things)


def _choose(rng: Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def _pick(rng: Generator, templates: list[str], *names: str) -> tuple[str]:
    return (_choose(rng, templates).format(*names),)
