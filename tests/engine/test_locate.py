"""Scores of boxes by hand, boxes by beams and by likelihood, and the calibration of their confidence."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from qvl_runtime import Box, Engine, SamplingParams
from qvl_runtime.engine.calibrating import Judged, average_precision, expected_error, fit, ranking, risk_coverage
from qvl_runtime.engine.engine import NANO
from qvl_runtime.engine.locating import overlap
from qvl_runtime.errors import CheckpointError, PromptError
from qvl_runtime.prompt.box_calibration import FEATURES, BoxCalibration
from qvl_runtime.prompt.box_scores import box_scores
from qvl_runtime.prompt.box_spelling import BoxSpelling
from qvl_runtime.prompt.boxes import BoxScores
from qvl_runtime.prompt.tokenizer import Tokenizer

pytestmark = pytest.mark.cpu
ASK = "Box the {}."


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(dtype="float32", max_model_len=512, max_running=16)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    scene = Image.new("RGB", (144, 144), (150, 160, 170))
    pen = ImageDraw.Draw(scene)
    pen.ellipse((20, 30, 70, 78), fill=(220, 30, 30))
    pen.rectangle((85, 80, 130, 128), fill=(30, 60, 220))
    return scene


def test_scores_are_those_of_the_definition() -> None:
    """One box, made-up probabilities: shares among what may come next, expectation and spread by enumeration."""
    spelling = BoxSpelling(Tokenizer.from_folder(NANO))
    ids = spelling.tokenizer.encode("<box>(12,300),(999,301)</box>")
    dice = random.Random(1)
    among: list[dict[int, float] | None] = [None]
    for _ in ids[1:]:
        among.append({token: math.log(dice.random()) for token in spelling.alphabet})
    scores = box_scores(spelling, ids, [math.log(0.25)] + [-1.0] * (len(ids) - 1), among)
    assert scores is not None and scores.presence == pytest.approx(0.25)

    comma = spelling.box.pieces[1][0]
    ten = list(spelling.digits)
    legal = {2: ten, 3: [*ten, comma], 4: [*ten, comma]}  # <box> ( 1 2 , ...
    place = {token: digit for digit, token in enumerate(spelling.digits)}
    first: dict[Any, float] = {}
    chosen = 0.0
    for i, tokens in legal.items():
        at = among[i] or {}
        total = sum(math.exp(at[token]) for token in tokens)
        first |= {(i, place.get(token, "end")): math.exp(at[token]) / total for token in tokens}
        chosen += at[ids[i]] - math.log(total)
    assert scores.logprob < chosen
    cases = [(10 * d, 10 * d + 9, first[2, d]) for d in range(10) if d != 1]
    moments = [((low + high) / 2, ((high - low + 1) ** 2 - 1) / 12, p) for low, high, p in cases]
    moments.append((1, 0, first[2, 1] * first[3, "end"]))
    moments += [(10 + d, 0, first[2, 1] * first[3, d]) for d in range(10) if d != 2]
    path = first[2, 1] * first[3, 2]
    moments += [(120 + d, 0, path * first[4, d]) for d in range(10)] + [(12, 0, path * first[4, "end"])]
    assert sum(p for *_, p in moments) == pytest.approx(1)
    mean = sum(m * p for m, _, p in moments)
    assert scores.expectation[0] == pytest.approx(mean)
    assert scores.spread[0] == pytest.approx(math.sqrt(sum(p * ((m - mean) ** 2 + v) for m, v, p in moments)))
    assert all(low <= value <= 1000 for value, low in zip(scores.expectation, (0, 0, 13, 301), strict=True))
    spaced = spelling.tokenizer.encode("<box>(1, 2),(3,4)</box>")
    assert box_scores(spelling, spaced, [-1.0] * len(spaced), [None, *[among[1]] * (len(spaced) - 1)]) is None


@pytest.mark.parametrize("options", [{}, {"speculative_tokens": 4}, {"graphs": False}], ids=str)
def test_every_answer_has_scores(image: Image.Image, options: dict[str, Any]) -> None:
    """The scores of a free answer are those of the held one and of `score_boxes`, in every mode."""
    engine = Engine(dtype="float32", max_model_len=512, **options)
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Box the red circle."}]
    free = engine.chat([{"role": "user", "content": content}], SamplingParams(temperature=0))
    held = engine.chat([{"role": "user", "content": content}], SamplingParams(temperature=0, boxes="force"))
    (box,), (same,) = free.boxes, held.boxes
    assert box.details is not None and same.details is not None and box.score is not None
    (scored,) = engine.score_boxes(image, box.label or "", [box], question=ASK)
    assert scored.details is not None and scored == replace(box, score=scored.score)
    for details in (same.details, scored.details):
        assert details.presence == pytest.approx(box.details.presence, rel=1e-3)
        assert details.logprob == pytest.approx(box.details.logprob, abs=1e-3)
        assert details.expectation == pytest.approx(box.details.expectation, abs=0.05)
        assert details.spread == pytest.approx(box.details.spread, abs=0.05)
    assert scored.score == pytest.approx(box.score, rel=1e-3)
    assert (same.score or 0) == pytest.approx(box.score, rel=1e-3)
    assert box.details.normalized >= 0.1 and box.details.confidence == box.details.confidence


def test_locate(engine: Engine, image: Image.Image) -> None:
    found = engine.locate(image, "red circle", question=ASK)
    (box,) = found.boxes
    assert overlap(box, Box(None, 139, 208, 486, 541)) > 0.6 and box.label == found.phrase == "red circle"
    several = engine.locate(image, "red circle", k=3, question=ASK)
    assert 1 <= len(several.boxes) <= 3 and list(several.masses) == sorted(several.masses, reverse=True)
    assert all(overlap(a, b) < 0.7 for i, a in enumerate(several.boxes) for b in several.boxes[:i])
    assert overlap(several.boxes[0], box) > 0.7 and sum(several.masses) <= 1.001
    assert found.draw().size == (144, 144)
    engine.core.runner.cache.check_integrity()
    bare = engine.locate(image, "red circle", question=None)
    assert bare.boxes and 0 <= bare.presence <= 1


def test_one_box_is_greedy(engine: Engine, image: Image.Image) -> None:
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Box the blue square."}]
    greedy = engine.chat([{"role": "user", "content": content}], SamplingParams(temperature=0, boxes="force"))
    assert engine.locate(image, "blue square", question=ASK).boxes[0] == replace(
        greedy.boxes[0], score=engine.locate(image, "blue square", question=ASK).boxes[0].score
    )


def test_a_box_that_fits_scores_higher(engine: Engine, image: Image.Image) -> None:
    given = [(139, 208, 486, 541), (590, 555, 903, 889), (0, 0, 1000, 1000), (139, 208, 486, 542)]
    boxes = engine.score_boxes(image, "red circle", given, question=ASK)
    logprobs = [box.details.logprob for box in boxes if box.details is not None]
    assert max(logprobs[1], logprobs[2]) < min(logprobs[0], logprobs[3]) - 5
    many = engine.score_boxes(image, "red circle", given * 40, question=ASK)  # in several steps
    assert [b.details.logprob for b in many[-4:] if b.details] == pytest.approx(logprobs, abs=1e-3)
    assert engine.score_boxes(image, "red circle", []) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e, i: e.locate(i, " "), "the phrase is ' '; expected what to look for"),
        (lambda e, i: e.locate(i, "x", k=0), "k is 0; expected 1 to 32"),
        (lambda e, i: e.locate(i, "x", k=2.0), "k is 2.0"),
        (lambda e, i: e.score_boxes(i, "x", [(1, 2, 3)]), "is not a box"),
        (lambda e, i: e.score_boxes(i, "x", [(5, 2, 5, 3)]), "has no area on the grid"),
        (lambda e, i: e.score_boxes(i, "x", [(5, 2, 1500, 3)]), "has no area on the grid"),
        (lambda e, i: e.score_boxes(i, "x", [(5.0, 2, 9, 3)]), "whole numbers"),
    ],
)
def test_mistakes(engine: Engine, image: Image.Image, call: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        call(engine, image)


def judged(count: int, seed: int = 0) -> list[Judged]:
    """Boxes that are right with a probability that their scores tell."""
    dice = random.Random(seed)
    found = []
    for _ in range(count):
        normalized, spread = dice.uniform(0.05, 1), dice.uniform(0, 200)
        truth = 1 / (1 + math.exp(-(4 + 3 * math.log(normalized) - 0.5 * math.log1p(spread))))
        scores = BoxScores(1.0, normalized, -1.0, (0.0,) * 4, (spread,) * 4)
        found.append(Judged(Box("x", 0, 0, 1, 1, details=scores), float(dice.random() < truth)))
    return found


def test_calibration_holds_on_what_it_has_not_seen(tmp_path: Path) -> None:
    found = fit(judged(4000))
    assert found.weights[0] == pytest.approx(3, abs=0.5) and found.bias == pytest.approx(4, abs=0.8)
    assert found.ece is not None and found.ece < 0.03 and found.auroc is not None and found.auroc > 0.7
    path = tmp_path / "box_calibration.json"
    path.write_text(json.dumps(found.to_dict()), "utf-8")
    assert BoxCalibration.from_folder(tmp_path) == found and BoxCalibration.from_folder(tmp_path / "none") is None
    with pytest.raises(PromptError, match="expected right and wrong ones"):
        fit([replace(one, iou=1.0) for one in judged(100)])
    whole = found.to_dict()
    wrong = [whole | {"features": ["x"]}, whole | {"weights": [1]}, whole | {"bias": "x"}]
    for broken in ("{", "[]", *map(json.dumps, wrong)):
        path.write_text(broken, "utf-8")
        with pytest.raises(CheckpointError):
            BoxCalibration.from_folder(tmp_path)
    assert len(FEATURES) == 3


def test_measures_by_hand() -> None:
    assert ranking([0.9, 0.8, 0.3, 0.1], [True, False, True, False]) == 0.75
    assert ranking([1, 1], [True, False]) == 0.5 and math.isnan(ranking([1, 2], [True, True]))
    assert expected_error([0.95, 0.95, 0.15], [True, False, False]) == pytest.approx((2 * 0.45 + 0.15) / 3)
    assert average_precision([0.9, 0.8, 0.7], [True, False, True], 2) == pytest.approx((1 + 2 / 3) / 2)
    coverage, risk = risk_coverage([0.9, 0.5, 0.7], [True, False, True])
    assert coverage.tolist() == pytest.approx([1 / 3, 2 / 3, 1]) and risk.tolist() == pytest.approx([0, 0, 1 / 3])


def test_the_command_fits_and_the_engine_uses_it(engine: Engine, image: Image.Image, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from qvl_runtime.cli.app import app

    image.save(tmp_path / "scene.png")
    lines = [{"image": "scene.png", "phrase": name, "box": box} for name, box in (
        ("red circle", [139, 208, 486, 541]), ("blue square", [590, 555, 903, 889]),
        ("red circle", [590, 555, 903, 889]), ("cat", None))] * 2  # fmt: skip
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    out = tmp_path / "box_calibration.json"
    asked = [str(tmp_path / "data.jsonl"), "--out", str(out), "--question", ASK, "--max-model-len", "512"]
    result = CliRunner().invoke(app, ["calibrate", *asked, "--json", "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text("utf-8"))["question"] == ASK
    calibration = BoxCalibration.from_file(out)
    judge = engine.core.answers.judge
    engine.core.answers.judge = replace(judge, calibration=calibration)
    try:
        (box,) = engine.locate(image, "red circle").boxes  # asks what the calibration asked
    finally:
        engine.core.answers.judge = judge
    assert box.details is not None and 0 < (box.details.confidence or 0) < 1
    assert torch.isfinite(torch.tensor(box.details.spread)).all()
