"""DeepSpeed's configurations: the two that the original ships, and every value that has no equal here."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from qvl_runtime.errors import ConfigError
from qvl_runtime.finetune.deepspeed_config import with_deepspeed_config
from qvl_runtime.finetune.optimizer import rate_at
from qvl_runtime.finetune.options import FinetuneOptions

pytestmark = pytest.mark.unit
NO_OFFLOAD = {"device": "none", "pin_memory": True}
COMMON: dict[str, Any] = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16, "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    "scheduler": {
        "type": "WarmupLR",
        "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto"),
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 100,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
ZERO2 = {
    **COMMON,
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": dict(NO_OFFLOAD),
        "allgather_partitions": True,
        "allgather_bucket_size": 2e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 2e8,
        "contiguous_gradients": True,
    },
}
ZERO3 = {
    **COMMON,
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": dict(NO_OFFLOAD),
        "offload_param": dict(NO_OFFLOAD),
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


def read(folder: Path, values: Any, **options: Any) -> FinetuneOptions:
    (folder / "ds.json").write_text(json.dumps(values))
    return with_deepspeed_config(FinetuneOptions(**options), folder / "ds.json")


def changed(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with one value set, at a path such as "zero_optimization.stage"."""
    copy = deepcopy(values)
    *sections, name = path.split(".")
    inner = copy
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[name] = value
    return copy


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the second of two processes that torchrun starts."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(
    ("values", "method", "sharding"),
    [
        (ZERO2, "full", "gradients"),
        (ZERO2, "lora", "data"),
        (ZERO2, "qlora", "data"),
        (ZERO3, "full", "fsdp"),
        (ZERO3, "lora", "fsdp"),
        ({}, "full", "data"),
    ],
)
def test_a_stage_is_a_sharding(values: Any, method: Any, sharding: str, tmp_path: Path) -> None:
    found = read(tmp_path, values, method=method, rate=3e-4, accumulate=16)
    schedule = "constant" if values else "cosine"
    assert found == FinetuneOptions(method=method, rate=3e-4, accumulate=16, sharding=sharding, schedule=schedule)


@pytest.mark.parametrize("values", [ZERO2, ZERO3])
def test_one_process_shards_nothing(values: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert read(tmp_path, values).sharding == "none"


@pytest.mark.usefixtures("two")
def test_numbers_are_taken_over(tmp_path: Path) -> None:
    values = changed(ZERO2, "optimizer.params", {"lr": 2e-4, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.01})
    values |= {"gradient_accumulation_steps": 4, "train_micro_batch_size_per_gpu": 2, "train_batch_size": 16}
    values |= {"gradient_clipping": 0.5, "bf16": {"enabled": True}}
    found = read(tmp_path, values)
    assert (found.rate, found.beta2, found.weight_decay, found.clip) == (2e-4, 0.99, 0.01, 0.5)
    assert (found.accumulate, found.batch, found.pack, found.dtype) == (8, 2, False, "bfloat16")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("zero_optimization.offload_optimizer.device", "cpu", r"offload_optimizer to 'cpu'.*--masters bfloat16"),
        ("zero_optimization.offload_param.device", "nvme", r"offload_param to 'nvme'.*'none'"),
        ("zero_optimization.stage", 4, r"stage 4; expected 0 to 3"),
        ("zero_optimization", [2], r"zero_optimization .*expected an object"),
        ("fp16.enabled", True, r"fp16, in which the vision encoder overflows"),
        ("optimizer.type", "OneBitAdam", r"optimizer 'OneBitAdam'; supported are Adam, AdamW"),
        ("optimizer.params.betas", [0.8, 0.99], r"betas .*expected \[0\.9, X\]"),
        ("optimizer.params.eps", 1e-6, r"eps 1e-06; expected 1e-08"),
        ("optimizer.params.lr", "fast", r"lr 'fast'; expected a number"),
        ("optimizer.params.lr", -1.0, r"rate"),
        ("scheduler.type", "OneCycle", r"scheduler 'OneCycle'; supported are WarmupLR"),
        ("scheduler.params.warmup_num_steps", 100, r"'warmup_num_steps' 100.*--warmup"),
        ("train_batch_size", 100, r"train_batch_size 100, and 8 micro-batches of 1 in 1 processes are 8"),
        ("gradient_accumulation_steps", True, r"gradient_accumulation_steps True; expected a number"),
        ("activation_checkpointing", {}, r"'activation_checkpointing', which has no equal here"),
    ],
)
def test_what_has_no_equal_is_named(
    path: str, value: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match=words):
        read(tmp_path, changed(ZERO3, path, value))


def test_a_file_that_is_none(tmp_path: Path) -> None:
    for content, words in (("[]", "expected an object"), ("{", "ds.json")):
        (tmp_path / "ds.json").write_text(content)
        with pytest.raises(ConfigError, match=words):
            with_deepspeed_config(FinetuneOptions(), tmp_path / "ds.json")
    with pytest.raises(ConfigError, match=r"none\.json does not exist; expected a DeepSpeed"):
        with_deepspeed_config(FinetuneOptions(), tmp_path / "none.json")


def test_a_constant_schedule_warms_up_and_stays() -> None:
    options = FinetuneOptions(rate=1.0, warmup=0.1, schedule="constant")
    assert [rate_at(step, 20, options) for step in (0, 1, 2, 19)] == [0.5, 1.0, 1.0, 1.0]
    assert "schedule" not in FinetuneOptions().key() and options.key()["schedule"] == "constant"
