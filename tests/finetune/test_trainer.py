"""The loop: it overfits, a resumed run gives the same weights, bad steps are left out, a kill keeps the last state."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qvl_runtime import Engine, SamplingParams
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.engine.engine import NANO
from qvl_runtime.errors import CheckpointError, ConfigError, NumericsError
from qvl_runtime.finetune.network import Losses
from qvl_runtime.finetune.optimizer import Optimizer, RandomlyRoundedAdamW, randomly_rounded, rate_at
from qvl_runtime.finetune.options import FinetuneOptions
from qvl_runtime.finetune.run import Finetuning, with_defaults_of
from qvl_runtime.finetune.trainer import Trainer
from qvl_runtime.formats.adapter import AdapterConfig
from qvl_runtime.weights.checkpoint import load_state

pytestmark = pytest.mark.cpu
LORA = AdapterConfig(r=4, lora_dropout=0.1)
QUICK = FinetuneOptions(
    method="lora", epochs=2, accumulate=2, pack=False, rate=1e-2, lora=LORA, dtype="float32", save_every=2,
    checkpointing=False,
)  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six records, half of them with an image."""
    records = []
    for number in range(6):
        Image.fromarray(np.full((30, 30, 3), 40 * number, np.uint8)).save(tmp_path / f"{number}.png")
        picture = f"Picture 1: <img>{number}.png</img>\n" if number % 2 else ""
        turns = [
            {"from": "user", "value": f"{picture}What is {number}?"},
            {"from": "assistant", "value": f"{number}" * 3},
        ]
        records.append({"id": str(number), "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path / "data.json"


class StopError(Exception):
    """Raised to stop a run."""


def stop_after(steps: int) -> Any:
    def progress(done: int, total: int) -> None:
        if done == steps:
            raise StopError

    return progress


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(source: Path, data: Path, tmp_path: Path) -> None:
    whole = Finetuning.open(source, data, tmp_path / "whole", QUICK)
    entries = whole.run()
    assert [entry["step"] for entry in entries] == list(range(1, 7)) and entries[-1]["loss"] < entries[0]["loss"]
    with pytest.raises(StopError):
        Finetuning.open(source, data, tmp_path / "parts", QUICK).run(progress=stop_after(3))
    assert not (tmp_path / "parts").exists()
    resumed = Finetuning.open(source, data, tmp_path / "parts", QUICK).run()
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    for first, second in zip(entries, resumed, strict=True):
        assert {**first, "seconds": 0, "tokens_per_s": 0} == {**second, "seconds": 0, "tokens_per_s": 0}
    assert (tmp_path / "parts" / "curve.png").is_file() and not (tmp_path / ".parts.partial").exists()


def test_full_training_resumes_too_and_gives_a_checkpoint(source: Path, data: Path, tmp_path: Path) -> None:
    options = replace(QUICK, method="full", dtype="bfloat16", rate=1e-3)
    Finetuning.open(source, data, tmp_path / "whole", options).run()
    with pytest.raises(StopError):
        Finetuning.open(source, data, tmp_path / "parts", options).run(progress=stop_after(3))
    Finetuning.open(source, data, tmp_path / "parts", options).run()
    names = ("model.safetensors", "config.json", "qwen.tiktoken")
    assert all((tmp_path / "parts" / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in names)
    config = ModelConfig.from_folder(tmp_path / "whole")
    assert config.dtype == "bfloat16"
    after, before = (load_state(f, config, torch.bfloat16) for f in (tmp_path / "whole", source))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert "transformer.wte.weight" in changed and "transformer.visual.attn_pool.query" in changed
    assert not any(name.startswith("transformer.visual.transformer") for name in changed), "the ViT is frozen"
    assert "transformer.visual.attn_pool.pos_embed" not in changed and "transformer.visual.proj" not in changed


def test_another_run_does_not_resume_this_ones_work(source: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(StopError):
        Finetuning.open(source, data, tmp_path / "out", QUICK).run(progress=stop_after(2))
    with pytest.raises(CheckpointError, match=r"rate 0\.01 instead of 0\.5"):
        Finetuning.open(source, data, tmp_path / "out", replace(QUICK, rate=0.5)).run()
    records = json.loads(data.read_text())
    data.write_text(json.dumps(records[:5]))
    with pytest.raises(CheckpointError, match="data '"):
        Finetuning.open(source, data, tmp_path / "out", QUICK).run()


@pytest.mark.parametrize("method", ["lora", "full", "qlora"])
def test_four_samples_are_learned_by_heart(method: str, data: Path, tmp_path: Path) -> None:
    folder = NANO.with_name("nano_int4") if method == "qlora" else NANO
    data.write_text(json.dumps(json.loads(data.read_text())[:4]))
    options = FinetuneOptions(
        method=method, labels="answers", epochs=40, accumulate=1, rate=1e-3 if method == "full" else 4e-3,
        checkpointing=False, lora=AdapterConfig(lora_dropout=0.0), dtype="float32",
    )  # fmt: skip
    entries = Finetuning.open(folder, data, tmp_path / "out", options).run()
    assert entries[-1]["loss"] < 0.01
    if method == "full":
        engine, own = Engine(tmp_path / "out", max_model_len=512), None
    else:
        engine, own = Engine(folder, adapters={"own": tmp_path / "out"}, max_model_len=512), "own"
    params = SamplingParams(temperature=0, max_tokens=8, adapter=own)
    answers = engine.generate([[{"role": "user", "content": f"What is {n}?"}] for n in (0, 2)], params)
    assert [answer.text for answer in answers] == ["000", "222"]


def test_a_killed_save_keeps_the_last_good_state(source: Path, data: Path, tmp_path: Path) -> None:
    """The process is killed by SIGKILL while it writes its second state; the run resumes from the first."""
    code = f"""
import os, signal
from dataclasses import replace
from pathlib import Path
from qvl_runtime.finetune import run_folder
from qvl_runtime.finetune.run import Finetuning
from tests.finetune.test_trainer import QUICK
sync, seen = run_folder.sync, []
def killed(path):
    if path.name == "state.pt":
        seen.append(path)
        if len(seen) == 2:
            path.write_bytes(path.read_bytes()[:1000])
            os.kill(os.getpid(), signal.SIGKILL)
    sync(path)
run_folder.sync = killed
Finetuning.open(Path({str(source)!r}), Path({str(data)!r}), Path({str(tmp_path / "out")!r}), QUICK).run()
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    states = sorted(path.name for path in (tmp_path / ".out.partial" / "states").iterdir())
    assert states == ["step-00000002", "step-00000004.writing"]
    seen: list[int] = []
    Finetuning.open(source, data, tmp_path / "out", QUICK).run(on_start=lambda trainer: seen.append(trainer.step))
    Finetuning.open(source, data, tmp_path / "whole", QUICK).run()
    assert seen == [2] and weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_a_full_disk_leaves_the_last_state(
    source: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, count = torch.save, []

    def full(state: Any, path: Any) -> None:
        count.append(path)
        if len(count) == 2:
            raise OSError(28, "No space left on device")
        saved(state, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="disk is full"):
        Finetuning.open(source, data, tmp_path / "out", QUICK).run()
    assert [path.name for path in (tmp_path / ".out.partial" / "states").iterdir()] == ["step-00000002"]


def test_losses_that_are_not_finite_are_skipped_and_end_the_run_in_a_row(
    source: Path, data: Path, tmp_path: Path
) -> None:
    def poison(trainer: Trainer) -> None:
        real, calls = trainer.learner.losses, []

        def losses(samples: Any) -> Losses:
            calls.append(samples)
            learned, kept = real(samples)
            return Losses(learned * (math.nan if len(calls) in poisoned else 1.0), kept)

        trainer.learner.losses = losses  # type: ignore[method-assign]

    poisoned = {2, 5, 6}
    entries = Finetuning.open(source, data, tmp_path / "some", QUICK).run(on_start=poison)
    assert entries[-1]["skipped"] == 3 and entries[2]["loss"] is None and entries[2]["norm"] is None
    poisoned = set(range(3, 100))
    with pytest.raises(NumericsError, match=r"2 steps in a row.*step 3.*rate"):
        Finetuning.open(source, data, tmp_path / "all", replace(QUICK, most_faults=2)).run(on_start=poison)


def test_an_image_that_vanishes_costs_its_record_alone(source: Path, data: Path, tmp_path: Path) -> None:
    job = Finetuning.open(source, data, tmp_path / "out", replace(QUICK, batch=6))
    (tmp_path / "3.png").write_bytes(b"no longer an image")
    entries = job.run()
    assert entries[-1]["skipped"] == 2 and entries[-1]["loss"] is not None, "once an epoch"


def test_methods_that_do_not_fit_name_the_one_that_does(source: Path, whole: Path, data: Path, tmp_path: Path) -> None:
    for folder, method, words in (
        (source, "qlora", r"not quantized: use 'lora'"),
        (whole, "lora", r"4 bits: use 'qlora'"),
        (whole, "full", r"or the float checkpoint"),
    ):
        with pytest.raises(ConfigError, match=words):
            Finetuning.open(folder, data, tmp_path / "out", replace(QUICK, method=method))
    with pytest.raises(ConfigError, match="match no linear"):
        options = replace(QUICK, lora=AdapterConfig(target_modules=("q_proj",)))
        Finetuning.open(source, data, tmp_path / "out", options).run()
    for name, value in (("rate", 0), ("warmup", 1.0), ("method", "dora"), ("parts", ("ears",)), ("masters", "int8")):
        with pytest.raises(ConfigError, match=name):
            replace(QUICK, **{name: value})


def test_lora_on_a_base_checkpoint_trains_embedding_and_head(source: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "generation_config.json").write_text('{"chat_format": "raw"}')
    chosen = with_defaults_of(FinetuneOptions(), base)
    assert chosen.lora.modules_to_save == ("wte", "lm_head") and chosen.masters == "bfloat16"
    assert with_defaults_of(FinetuneOptions(), NANO) == FinetuneOptions()


def test_the_schedule_warms_up_and_falls_as_a_cosine() -> None:
    options = FinetuneOptions(rate=1.0, warmup=0.1)
    rates = [rate_at(step, 100, options) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)]) and rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5) and rates[99] < 0.01


def test_the_optimizer_is_torchs_adamw_over_masters() -> None:
    options = FinetuneOptions(rate=0.1)
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(4, 3, generator=generator), torch.randn(3, 4, 3, generator=generator).bfloat16()
    parameter = torch.nn.Parameter(start.bfloat16())
    ours = Optimizer([("w", parameter)], options)
    theirs = torch.nn.Parameter(start.bfloat16().float())
    adam = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for gradient in gradients:
        (parameter * gradient).sum().backward()
        assert parameter.grad is None, "it is handed over to the master"
        ours.step(0.1)
        theirs.grad = gradient.float()
        adam.step()
        assert torch.equal(parameter, theirs.bfloat16())


def test_random_rounding_keeps_the_expectation() -> None:
    value = torch.full((20_000,), 1 + 1 / 1024)  # an eighth of the way from 1 to its neighbor
    rounded = randomly_rounded(value, torch.Generator().manual_seed(0)).float()
    assert set(rounded.tolist()) == {1.0, 1.0078125}
    assert rounded.mean().item() == pytest.approx(1 + 1 / 1024, abs=2e-4)
    parameter = torch.nn.Parameter(torch.ones(20_000, 1).bfloat16())
    optimizer = RandomlyRoundedAdamW({"w": parameter}, 0.95, 0.0, 0)
    for _ in range(20):  # each update is a tenth of the last bit: rounding to nearest would lose all
        parameter.grad = torch.ones_like(parameter)
        optimizer.step(4e-4)
    assert parameter.float().mean().item() == pytest.approx(1 - 20 * 4e-4, abs=1e-3)
