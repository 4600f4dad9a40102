"""Read a DeepSpeed configuration, such as the two that the original ships, as options of this trainer.

DeepSpeed itself is not used: what its stages mean, torch does. Stage 0 is data parallel. Stages 1 and 2 divide
optimizer state and gradients (FSDP2 that keeps a weight gathered until its backward pass), stage 3 the weights, too
(FSDP2). Sizes of buckets and the like are about DeepSpeed's own way to communicate, and are left out. A value that
would change what is learned is taken over, or refused by name; "auto" is the option of the command line.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qvl_runtime.config.checks import read_json
from qvl_runtime.errors import ConfigError, quoted
from qvl_runtime.finetune.optimizer import BETA1, EPS
from qvl_runtime.finetune.options import FinetuneOptions

AUTO = "auto"
OPTIMIZERS = ("Adam", "AdamW")  # transformers makes both AdamW, and so did the original
SCHEDULES = {"WarmupLR": "constant", "WarmupCosineLR": "cosine"}
WITHOUT_EFFECT = {"steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer", "communication_data_type"}
_SECTIONS = {"zero_optimization", "fp16", "bf16", "optimizer", "scheduler"}
_COUNTS = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"}


def with_deepspeed_config(options: FinetuneOptions, path: Path) -> FinetuneOptions:
    """The options as a DeepSpeed configuration changes them, for the processes that torchrun has started.

    Raises `ConfigError` for what has no equal here, such as offloading or float16, and for numbers that disagree.
    """
    if not path.exists():
        raise ConfigError(f"{path} does not exist; expected a DeepSpeed configuration in JSON")
    values = read_json(path)
    if unknown := sorted(set(values) - _SECTIONS - _COUNTS - WITHOUT_EFFECT):
        raise ConfigError(f"{path} has {quoted(unknown[0])}, which has no equal here: remove it")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    changes: dict[str, Any] = {"sharding": _sharding(_section(values, "zero_optimization", path), options, path)}
    if _section(values, "fp16", path).get("enabled") is True:
        raise ConfigError(f"{path} enables fp16, in which the vision encoder overflows: use bf16")
    if _section(values, "bf16", path).get("enabled") is True:
        changes["dtype"] = "bfloat16"
    changes |= _optimizer(_section(values, "optimizer", path), path)
    changes |= _schedule(_section(values, "scheduler", path), path)
    counts = {name: _number(values, name, path) for name in _COUNTS}
    batch, steps = counts["train_micro_batch_size_per_gpu"], counts["gradient_accumulation_steps"]
    if batch is not None:
        changes |= {"batch": int(batch), "pack": False}
    if steps is not None:
        changes["accumulate"] = int(steps) * size
    if counts["gradient_clipping"] is not None:
        changes["clip"] = counts["gradient_clipping"]
    changed = replace(options, **changes)
    if (whole := counts["train_batch_size"]) is not None and whole != changed.batch * changed.accumulate:
        raise ConfigError(
            f"{path} has the train_batch_size {whole:g}, and {changed.accumulate} micro-batches of {changed.batch} in "
            f"{size} processes are {changed.batch * changed.accumulate}: correct it, or set it to {AUTO!r}"
        )
    return changed


def _sharding(zero: Mapping[str, Any], options: FinetuneOptions, path: Path) -> str:
    """What a stage means: for one process nothing, and for the few weights of LoRA stages below 3 are data parallel."""
    for name in ("offload_optimizer", "offload_param"):
        device = _section(zero, name, path).get("device", "none")
        if device not in ("none", None):
            raise ConfigError(
                f"{path} has {name} to {quoted(device)}, which is not supported: set its device to 'none', and save "
                "memory by more processes with stage 3, by --masters bfloat16 or by LoRA"
            )
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ConfigError(f"{path} has the stage {quoted(stage)}; expected 0 to 3")
    if "RANK" not in os.environ:
        return "none"
    if stage == 3:
        return "fsdp"
    return "gradients" if stage and not options.uses_lora else "data"


def _optimizer(section: Mapping[str, Any], path: Path) -> dict[str, Any]:
    if not section:
        return {}
    kind, params = section.get("type"), _section(section, "params", path)
    if kind not in OPTIMIZERS:
        raise ConfigError(f"{path} has the optimizer {quoted(kind)}; supported are {', '.join(OPTIMIZERS)}")
    changes = {"rate": _number(params, "lr", path), "weight_decay": _number(params, "weight_decay", path)}
    betas = params.get("betas", AUTO)
    if betas != AUTO:
        if not isinstance(betas, list) or len(betas) != 2 or betas[0] != BETA1:
            raise ConfigError(f"{path} has the betas {quoted(betas)}; expected [{BETA1}, X]")
        changes["beta2"] = betas[1]
    if _number(params, "eps", path) not in (None, EPS):
        raise ConfigError(f"{path} has the eps {quoted(params['eps'])}; expected {EPS:g}")
    return {name: value for name, value in changes.items() if value is not None}


def _schedule(section: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The shape of the schedule. Its numbers come from the options: in the published files all of them are "auto"."""
    if not section:
        return {}
    kind, params = section.get("type"), _section(section, "params", path)
    if kind not in SCHEDULES:
        raise ConfigError(f"{path} has the scheduler {quoted(kind)}; supported are {', '.join(SCHEDULES)}")
    for name, value in params.items():
        if value != AUTO and not (name == "warmup_min_lr" and value == 0):
            raise ConfigError(
                f"{path} has {quoted(name)} {quoted(value)}: set it to {AUTO!r}, and use --rate and --warmup"
            )
    return {"schedule": SCHEDULES[kind]}


def _section(values: Mapping[str, Any], name: str, path: Path) -> Mapping[str, Any]:
    section = values.get(name) or {}
    if not isinstance(section, dict):
        raise ConfigError(f"{path} has {name} {quoted(section)}; expected an object")
    return section


def _number(values: Mapping[str, Any], name: str, path: Path) -> float | None:
    """A number, or None for "auto" and where it is missing."""
    value = values.get(name, AUTO)
    if value == AUTO:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ConfigError(f"{path} has {name} {quoted(value)}; expected a number or {AUTO!r}")
    return value
