"""Synthetic checkpoints on the disk, and the commands that take them: plan, convert, verify, back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qvl_runtime.cli.app import app
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.engine.engine import NANO, Engine
from qvl_runtime.schedule.api import SamplingParams
from qvl_runtime.weights.checkpoint import Checkpoint
from tools.make_synthetic import main

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "int4"
    small = ["--divide", "16", "--layers", "2", "--vision-layers", "1", "--file-bytes", "2000000"]
    assert main([str(folder), "--like", str(NANO), *small]) == 0
    return folder


def test_it_is_a_checkpoint_like_the_published(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig.from_folder(made)
    assert (config.num_hidden_layers, config.hidden_size, config.visual.layers) == (2, 256, 1)
    checkpoint = Checkpoint.open(made, config)
    assert len(checkpoint.paths) > 3 and "transformer.h.1.mlp.w1.g_idx" in checkpoint
    out = Engine(made, kv_cache_bytes=1 << 24).generate(["Hello"], SamplingParams(max_tokens=3, ignore_eos=True))
    assert len(out[0].token_ids) == 3
    assert main([str(made), "--like", str(NANO)]) == 2 and "exists already" in capsys.readouterr().err


def test_the_commands(made: Path, tmp_path: Path) -> None:
    def qvl(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, [*arguments])
        assert result.exit_code == code, result.output
        return result.output

    there, back = str(tmp_path / "there"), str(tmp_path / "back")
    assert "Nothing was written" in qvl("convert", str(made), there, "--dry-run") and not Path(there).exists()
    assert "8 linears repacked for cpu" in qvl("convert", str(made), there)
    assert "all match qvl_manifest.json" in qvl("verify", there)
    assert "identical to the converted originals (SHA-256)" in qvl("convert", there, back, "--to", "hf")
    for path in made.iterdir():
        assert (Path(back) / path.name).read_bytes() == path.read_bytes()
    assert "exists already" in qvl("convert", str(made), there, code=2)
    assert "so --head cannot apply" in qvl("convert", there, back, "--to", "hf", "--head", "int8", code=2)
    plan = json.loads(qvl("plan", there, "--gpu", "a100-40", "--json"))
    assert plan["fits"]["tokens"] > 8192 and plan["peaks"]["encode 2048"]["fits"]
    assert "a bound, not a forecast" in " ".join(qvl("plan", there, "--gpu", "h100").split())
    assert "compute capability 7.5" in qvl("plan", there, "--gpu", "t4", code=2)
