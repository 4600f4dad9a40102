"""`qvl demo` on a fake engine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qvl_runtime.cli.demo import DemoPlan, run
from qvl_runtime.errors import ConfigError
from tests.fakes import FakeEngine, make_image

pytestmark = pytest.mark.unit

PLAN = {"image": "demo.png", "caption_prompt": "Describe", "question": "How many?", "box_prompt": "Box the dog"}


def plan_folder(folder: Path, plan: dict[str, Any]) -> Path:
    make_image(folder / "demo.png")
    (folder / "demo.json").write_text(json.dumps(plan), encoding="utf-8")
    return folder


def test_demo_asks_three_questions_draws_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine, out = FakeEngine(), tmp_path / "out.png"
    run(engine, out, DemoPlan.from_folder(plan_folder(tmp_path, PLAN)))
    prompts = [(len(messages), messages[0]["content"][-1]["text"]) for messages, _ in engine.calls]
    assert prompts == [(1, "Describe"), (1, "How many?"), (1, "Box the dog")]
    assert all(params.temperature == 0 for _, params in engine.calls), "a demo must not depend on luck"
    output = capsys.readouterr().out
    assert "you said Describe" in output
    assert f"wrote    {out}, with 1 box drawn" in output
    assert re.search(r"ran on +nothing \(a fake\), words", output)
    assert re.search(r"memory +3.0 MiB of weights, 512 B of KV cache", output)
    assert re.search(r"box +10 +1 +30 ms +200 tok/s +2.0 tok/s +80 ms", output)
    with Image.open(out) as drawn:
        assert drawn.convert("L").getextrema()[0] < 255, "nothing is drawn on the white image"


@pytest.mark.parametrize("missing", sorted(PLAN))
def test_an_incomplete_plan_is_refused_by_name(tmp_path: Path, missing: str) -> None:
    folder = plan_folder(tmp_path, {name: text for name, text in PLAN.items() if name != missing})
    with pytest.raises(ConfigError, match=f"demo.json has {missing} None; expected a string"):
        DemoPlan.from_folder(folder)
