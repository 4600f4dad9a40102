"""The checkpoints and the demo that ship with the package, through the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from qvl_runtime.cli.demo import ASSETS, DemoPlan
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.engine.engine import NANO
from tests.fakes import qvl

pytestmark = pytest.mark.cpu


def test_the_shipped_plan_is_whole() -> None:
    plan = DemoPlan.from_folder()
    assert plan.image.parent == ASSETS
    with Image.open(plan.image) as image:
        image.load()


def test_the_demo_runs_on_the_shipped_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from qvl_runtime.cli.app import main; main()", "demo", "--out", "boxed.png"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert (ran.returncode, ran.stderr) == (0, "")
    match = re.search(r"wrote    boxed.png, with (\d+) box", ran.stdout)
    assert match and int(match[1]) >= 1, ran.stdout
    with Image.open(tmp_path / "boxed.png") as drawn, Image.open(DemoPlan.from_folder().image) as plain:
        assert drawn.size == plain.size
        assert drawn.convert("RGB").tobytes() != plain.convert("RGB").tobytes()


def test_the_shipped_checkpoint_answers_in_json() -> None:
    image = str(DemoPlan.from_folder().image)
    result = qvl("generate", "Describe it.", "--image", image, "--json", "--temperature", "0", "--max-tokens", "8")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert 1 <= answer["usage"]["completion_tokens"] == len(answer["token_ids"]) <= 8
    assert answer["usage"]["images"] == 1 and answer["usage"]["image_tokens"] > 0
    assert answer["timings"]["ttft_s"] > 0


def test_info_describes_the_shipped_checkpoint() -> None:
    report = json.loads(qvl("info", "--json").stdout)
    model = report["model"]
    assert model["bytes"] < 16 * 2**20
    assert model["parameters"] == sum(part["parameters"] for part in model["parts"].values()) > 10**6
    assert report["versions"]["torch"] and report["kernels"]["ops"]
    shown = qvl("info").stdout
    assert f"{model['parameters']:,}" in shown
    assert all(check["cost"].split()[0] in shown for check in report["checks"] if not check["found"])


def test_the_shipped_int4_was_quantized_by_this_project_and_says_how() -> None:
    folder = NANO.with_name("nano_int4")
    report, quantization = json.loads((folder / "quantize_report.json").read_text()), ModelConfig.from_folder(folder)
    options, errors = report["options"], report["linears"]
    assert options["method"] == "gptq" and quantization.quantization is not None
    assert (options["bits"], options["group_size"]) == (quantization.quantization.bits, 64)
    assert len(errors) == 5 * quantization.num_hidden_layers
    assert all(linear["error"] < 0.6 * linear["rtn_error"] for linear in errors)
