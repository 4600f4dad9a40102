"""The decoder of a model with eight heads split among eight processes, which nano's four do not allow."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qvl_runtime import Engine, SamplingParams
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.formats.layout import expected_tensors
from qvl_runtime.parallel.leader import ParallelModel
from tests.checkpoints import RAW
from tests.gptq_checkpoints import gptq

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(sys.platform == "win32", reason="gloo and signals of POSIX")]
RANKS = 8
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True),
    SamplingParams(temperature=1.5, seed=3, n=3, max_tokens=12, ignore_eos=True),
]


@pytest.fixture
def eight_heads(source: Path, tmp_path: Path) -> Path:
    """An Int4 checkpoint of two layers in groups of 64 inputs, of which every process has whole ones of each linear."""
    config = json.loads((source / "config.json").read_text())
    raw = {**config, "num_attention_heads": RANKS, "hidden_size": 64 * RANKS, "intermediate_size": 256 * RANKS}
    raw["visual"] = {**RAW["visual"], "image_start_id": 470, "output_dim": 64 * RANKS}
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(spec.shape, generator=generator) * (1.0 if len(spec.shape) == 1 else spec.shape[-1] ** -0.5)
        for name, spec in expected_tensors(ModelConfig.from_dict(raw)).items()
    }
    folder = tmp_path / "eight"
    folder.mkdir()
    save_file(gptq(raw, state, "int4"), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    shutil.copy(source / "qwen.tiktoken", folder)
    return folder


def test_it_answers_like_one_process(eight_heads: Path) -> None:
    """Greedy and drawn tokens are equal, and log probabilities near, with prompts in chunks."""
    prompts = [{"token_ids": list(range(5, 5 + n))} for n in (1, 21, 90)]
    found = []
    for ranks in (1, RANKS):
        engine = Engine(eight_heads, dtype="float32", max_model_len=256, max_step_tokens=64, tensor_parallel=ranks)
        done = [engine.generate(prompts, params) for params in PARAMS]
        tokens = [[answer.token_ids for answer in one.answers] for some in done for one in some]
        found.append((tokens, engine.score(prompts[-1]).logprobs))
        if ranks > 1:
            assert engine.report()["kernels"]["decoder"] == f"split among {ranks} processes, no graphs"
            model = engine.core.runner.model
            assert isinstance(model, ParallelModel)
            model.ranks.end("the test is over")
            del model
        del engine
        gc.collect()
    (expected, scored), (split, again) = found
    assert split == expected and len({token for one in split for ids in one for token in ids}) > 20
    assert (again - scored).abs().max() < 1e-4
