"""The questions of a second run: crowded images, mostly with the questions that the first run left weak.

What fails after the first run is rarely the reading of a box or a color: nine in ten wrong answers are right about
another thing in the image. So every thing is boxed by name, every shape is asked for its color and every color for
its shape, which makes the answers of one image differ only by the name in the question.
"""

from __future__ import annotations

from dataclasses import replace

from numpy.random import Generator

from .dialogue import BOX, Turn, grounded, relations, turns
from .scenes import SceneConfig, Thing

CAPTION, DESCRIBE = 0.5, 0.3  # shares of the images that are also captioned and described


def crowded(config: SceneConfig) -> SceneConfig:
    """Pictures with as many things as the config allows (fewer where they do not fit)."""
    return replace(config, least=config.most)


def practice(rng: Generator, things: list[Thing], chinese: bool = False) -> list[Turn]:
    """A draw of questions about the things of an image, in random order: boxes of all, colors, shapes, relations."""
    drawn = turns(rng, things, chinese)
    out = [t for t in drawn if t.sort not in ("caption", "describe", "box")]
    out += [t for t in drawn if t.sort == "caption" and rng.random() < CAPTION]
    out += [t for t in drawn if t.sort == "describe" and rng.random() < DESCRIBE]
    for thing in things:
        name, forms = thing.name(chinese), BOX[chinese]
        out.append(Turn("box", forms[int(rng.integers(len(forms)))].format(name), grounded(thing, chinese)))
    known = {t.question for t in out}
    out += [t for t in relations(rng, things, chinese) if t.question not in known]
    return [out[i] for i in rng.permutation(len(out))]
