"""Scores before and after training on a new kind: saved, read, and compared scene by scene."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.nano.new_kind import compare, load_tallies, save_tallies
from tools.nano.scoring import Tally

pytestmark = pytest.mark.unit


def scenes(boxes: list[int], words: list[int]) -> list[Tally]:
    """A box of each scene with two marks, and a word."""
    return [
        Tally({"box: box IoU >= 0.9": box, "word": word}, {"box: box IoU >= 0.9": 2, "word": 1})
        for box, word in zip(boxes, words, strict=True)
    ]


def test_scores_are_compared_on_the_same_scenes(tmp_path: Path) -> None:
    before, after = scenes([2, 1, 0, 1] * 10, [1, 0] * 20), scenes([2, 2, 1, 1] * 10, [0, 1] * 20)
    save_tallies(before, tmp_path / "before.json")
    found = compare(after, load_tallies(tmp_path / "before.json"))
    box = found["boxes at IoU 0.9, both sorts"]
    assert box == found["box: box IoU >= 0.9"]
    assert (box["percent"], box["difference"]) == pytest.approx((75, 25))
    assert box["error"] == pytest.approx(25 / 40**0.5, rel=0.1), "half of the scenes have one mark of two more"
    assert found["word"]["difference"] == pytest.approx(0) and found["word"]["error"] > 10
    assert found["all answers"]["percent"] == pytest.approx(100 * (60 + 20) / 120)
    assert compare(after)["word"] == {"percent": 50}
    same = compare(before, load_tallies(tmp_path / "before.json"))
    assert all(each["difference"] == each["error"] == 0 for each in same.values())
