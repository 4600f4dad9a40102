"""A run by DeepSpeed's configuration gives what DeepSpeed itself gives, in two processes over gloo.

DeepSpeed is no dependency: where it is not installed, this is skipped. On a CPU it compiles an extension once, which
takes a minute or two.
"""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.finetune.data import read_dataset
from qvl_runtime.finetune.deepspeed_config import with_deepspeed_config
from qvl_runtime.finetune.features import FeatureStore
from qvl_runtime.finetune.learner import Learner
from qvl_runtime.finetune.opening import open_network
from qvl_runtime.finetune.options import FinetuneOptions
from qvl_runtime.finetune.parallel import joined_team
from qvl_runtime.finetune.trainer import schedule_of
from qvl_runtime.prompt.tokenizer import Tokenizer
from tests.finetune.test_deepspeed_config import ZERO2, ZERO3
from tests.finetune.test_processes import BASE, losses, run_two
from tests.finetune.test_trainer import data

__all__ = ["data"]
pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed: pip install it"),
]
NUMBERS: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "train_batch_size": 2,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": False},
    "fp16": {"enabled": False},
}


def theirs(source: Path, data: Path, out: Path, options: FinetuneOptions, environment: dict[str, str]) -> None:
    """Two steps of DeepSpeed's engine on our network, with micro-batches, rates and optimizer as ours have them."""
    os.environ.update(environment, DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    import deepspeed

    config = ModelConfig.from_folder(source)
    tokenizer = Tokenizer.from_folder(source, config.visual.n_queries, config.visual.image_start_id)
    with joined_team("data") as team:
        samples = read_dataset(data, tokenizer, 500, options.labels)
        network = open_network(source, config, options, torch.device("cpu"))
        learner = Learner(network, FeatureStore(network, 1 << 30))
        parameters = [p for p in network.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if (p.dim() < 2) == plain], "weight_decay": 0.0 if plain else 0.1}
            for plain in (False, True)
        ]
        adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=options.rate, betas=(0.9, 0.95), eps=1e-8)
        written = {
            name: value for name, value in {**ZERO2, **NUMBERS}.items() if name not in ("optimizer", "scheduler")
        }
        engine, *_ = deepspeed.initialize(
            model=network, optimizer=adam, config={**written, "zero_allow_untested_optimizer": True}
        )
        found = []
        for step, rows in enumerate(schedule_of(samples, options).steps()):
            own = [[samples.samples[i] for i in row] for row in rows]
            planned = sum(sample.num_targets for row in own for sample in row)
            torch.manual_seed(hash((options.seed, step, team.rank)) % 2**63)
            loss = learner.loss_sum(own[team.rank])
            engine.backward(loss * team.size / planned)
            engine.step()
            found.append(team.totals(float(loss.detach()))[0] / planned)
        if team.leads:
            out.mkdir()
            (out / "log.jsonl").write_text("".join(json.dumps({"loss": each}) + "\n" for each in found))
            torch.save({name: p.detach() for name, p in network.named_parameters() if p.requires_grad}, out / "w.pt")


@pytest.fixture
def pictured(data: Path) -> Path:
    """The data with an image in each record: DeepSpeed wants a gradient of every weight in every process."""
    records = json.loads(data.read_text())
    for number, record in enumerate(records):
        record["conversations"][0]["value"] = f"Picture 1: <img>{number}.png</img>\nWhat is {number}?"
    data.write_text(json.dumps(records))
    return data


@pytest.mark.parametrize("method", ["full", "lora"])
def test_ours_equals_theirs(method: Any, source: Path, pictured: Path, tmp_path: Path) -> None:
    options = replace(BASE, method=method, accumulate=2, schedule="constant", warmup=0.0, weight_decay=0.1)
    run_two(source, pictured, tmp_path / "theirs", options, target=theirs)
    for name, values, sharding in (("zero2", ZERO2, "gradients"), ("zero3", ZERO3, "fsdp")):
        (tmp_path / f"{name}.json").write_text(json.dumps({**values, "gradient_clipping": 1.0}))
        read = with_two(options, tmp_path / f"{name}.json")
        assert read.sharding == ("data" if method == "lora" and name == "zero2" else sharding)
        run_two(source, pictured, tmp_path / name, read)
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "theirs"), abs=1e-5)
    assert len(losses(tmp_path / "theirs")) == 6
    weights = torch.load(tmp_path / "theirs" / "w.pt", weights_only=True)
    if method == "full":
        ours = load_file(tmp_path / "zero2" / "model.safetensors")
        for key, tensor in weights.items():
            torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-5)


def with_two(options: FinetuneOptions, path: Path) -> FinetuneOptions:
    """The options as a process of two reads them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
            patch.setenv(name, value)
        return with_deepspeed_config(options, path)
