"""The fuzzing tool finds what it looks for, and what it has found stays mended."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from qvl_runtime.errors import PromptError
from tools.fuzz import harness, values
from tools.fuzz.__main__ import fuzz, main
from tools.fuzz.files import TARGETS as FILES
from tools.fuzz.harness import Failure, Target, run_case
from tools.fuzz.requests import TARGETS as REQUESTS

SEEDS = Path(__file__).with_name("fuzz_seeds.json")
TARGETS = {target.name: target for target in (*FILES, *REQUESTS)}


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_found_stays_mended(name: str) -> None:
    found = [seed["case"] for seed in json.loads(SEEDS.read_text()) if seed["target"] == name]
    if not found:
        pytest.skip("nothing was found there")
    case = TARGETS[name].make()
    for number in found:
        run_case(TARGETS[name], case, number)


def outcome(case: Any) -> str:
    return run_case(Target("test", lambda: case), case, 1)


def test_answers_and_refusals_are_told_from_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(rng: random.Random) -> None:
        raise PromptError("the prompt is 3; expected text: write it")

    assert outcome(lambda rng: 5) == "answered" and outcome(refuse) == "refused"
    for wrong, why in ((lambda rng: 1 / 0, "ZeroDivisionError"), (lambda rng: [][1], "IndexError")):
        with pytest.raises(Failure, match=why):
            outcome(wrong)
    with pytest.raises(Failure, match="not one bounded line"):
        outcome(lambda rng: (_ for _ in ()).throw(PromptError("")))
    monkeypatch.setattr(harness, "CASE_S", 0.05)
    with pytest.raises(Failure, match="takes more than"):
        outcome(lambda rng: time.sleep(5))
    peaks = iter([5 << 30, (6 << 30) + 1])  # the most that this process ever had says nothing of one case
    monkeypatch.setattr(harness, "_peak_bytes", lambda: next(peaks))
    with pytest.raises(Failure, match="takes 1024 MiB of memory"):
        outcome(lambda rng: 5)


def test_a_case_is_its_number() -> None:
    seen = []
    for _ in range(2):
        rng = random.Random("prompts/7")
        document = values.damaged(rng, {"a": [1, {"b": "c"}], "d": None}, 5)
        seen.append((repr(document), values.encoded(rng, document), values.damaged_bytes(rng, bytes(range(256)))))
    assert seen[0] == seen[1]


def test_a_short_run_of_a_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz("images", 3.0, seed=5) == []
    assert "images: " in capsys.readouterr().out
    assert main(["--only", "nothing"]) == 2
