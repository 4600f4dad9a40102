"""LoRA adapters in peft's files: `adapter_config.json` and `adapter_model.safetensors` (or an older .bin).

A tensor is named `base_model.model.MODULE.lora_A.weight`, [r, in], or `lora_B.weight`, [out, r], where MODULE is the
published name of a linear; a module that was trained whole (`modules_to_save`) is `base_model.model.MODULE.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvl_runtime.config.checks import read_json
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.errors import CheckpointError, ConfigError, quoted
from qvl_runtime.formats.adapter import Adapter, AdapterConfig, Side, linears_of, matches, shape_hash
from qvl_runtime.formats.finite import finite
from qvl_runtime.reading.regular_files import is_there
from qvl_runtime.weights.files import write_json
from qvl_runtime.weights.hints import few
from qvl_runtime.weights.shards import open_shard

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE, WEIGHTS_FILE, BASE_FILE = "adapter_config.json", "adapter_model.safetensors", "qvl_adapter.json"
PREFIX = "base_model.model."
_KINDS = (".lora_A.weight", ".lora_B.weight")
# What changes the function of an adapter and is not supported, with the value that means "not used".
_UNSUPPORTED: dict[str, Any] = {
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "fan_in_fan_out": False,
    "lora_bias": False,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_qalora": False,
    "alora_invocation_tokens": None,
    "arrow_config": None,
}


def read_adapter(folder: Path, config: ModelConfig) -> Adapter:
    """Read an adapter for the model of `config`, and check all of it before a weight is used.

    Tensors are mapped, in their stored dtype. Raises `ConfigError` for a feature that is not supported, and
    `CheckpointError` for a folder without an adapter, or with one of another base model.
    """
    folder = Path(folder)
    if not is_there(folder / CONFIG_FILE):
        raise CheckpointError(f"{folder} has no {CONFIG_FILE}; expected a LoRA adapter as peft saves it")
    own = _config(read_json(folder / CONFIG_FILE), folder)
    if is_there(folder / BASE_FILE):
        base = read_json(folder / BASE_FILE, CheckpointError)
        if base.get("base_sha256") != shape_hash(config):
            raise CheckpointError(
                f"{folder} was trained on a model of other sizes ({quoted(base.get('base'))}): load the model that it "
                "was trained on"
            )
    paths = [folder / name for name in (WEIGHTS_FILE, "adapter_model.bin") if is_there(folder / name)]
    if not paths:
        raise CheckpointError(f"{folder} has no {WEIGHTS_FILE}: copy the whole folder that peft saved")
    shard = open_shard(paths[0])
    return _checked(folder, own, {name: shard.tensor(name) for name in shard.infos}, config)


def write_adapter(folder: Path, adapter: Adapter, config: ModelConfig) -> None:
    """Write an adapter as peft does, into a folder that exists; tensors are stored in their dtype."""
    from safetensors.torch import save_file

    tensors = {f"{PREFIX}{name}.weight": weight for name, weight in adapter.saved.items()}
    for name, side in adapter.sides.items():
        tensors |= {f"{PREFIX}{name}{kind}": part for kind, part in zip(_KINDS, side, strict=True)}
    own = adapter.config
    save_file(
        {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE, {"format": "pt"}
    )
    content = {field.name: getattr(own, field.name) for field in fields(own)}
    content |= {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": list(own.target_modules),
        "modules_to_save": list(own.modules_to_save) or None,
    }
    write_json(folder / CONFIG_FILE, content)
    write_json(folder / BASE_FILE, {"base": own.base_model_name_or_path, "base_sha256": shape_hash(config)})


def _config(raw: Mapping[str, Any], folder: Path) -> AdapterConfig:
    if raw.get("peft_type") != "LORA":
        raise ConfigError(f"{folder} has peft_type {quoted(raw.get('peft_type'))}; supported is 'LORA'")
    for key, unused in _UNSUPPORTED.items():
        if raw.get(key) not in (None, unused):
            raise ConfigError(
                f"{folder} uses {key} ({quoted(raw[key])}), which is not supported: merge it into its base with peft"
            )
    if raw.get("bias", "none") != "none":
        raise ConfigError(f"{folder} trained biases (bias {quoted(raw['bias'])}), which is not supported: use 'none'")
    targets, saved = raw.get("target_modules"), raw.get("modules_to_save") or ()
    if isinstance(targets, str) or not isinstance(targets, list) or not isinstance(saved, (list, tuple)):
        raise ConfigError(f"{folder} has target_modules {quoted(targets)}; expected a list of module names")
    names = {field.name for field in fields(AdapterConfig)} - {"target_modules", "modules_to_save"}
    values = {name: raw[name] for name in names if raw.get(name) is not None}
    values = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, **values}  # peft's own defaults
    return AdapterConfig(target_modules=tuple(targets), modules_to_save=tuple(saved), **values)


def _checked(folder: Path, own: AdapterConfig, tensors: Mapping[str, Tensor], config: ModelConfig) -> Adapter:
    shapes = linears_of(config)
    parts: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    unexpected, misfits = [], []
    for stored, tensor in tensors.items():
        name = stored.removeprefix(PREFIX)
        kind = next((kind for kind in _KINDS if name.endswith(kind)), None)
        module = name.removesuffix(kind or ".weight")
        if kind is None:
            module = module.replace(".modules_to_save", "")
            fits = any(matches(module, target) for target in own.modules_to_save)
            wanted = (config.vocab_size, config.hidden_size)
            if not fits or module not in ("transformer.wte", "lm_head"):
                unexpected.append(stored)
            elif tuple(tensor.shape) != wanted:
                misfits.append(f"{stored} of shape {tuple(tensor.shape)}; expected {wanted}")
            else:
                saved[module] = finite(stored, tensor, tensor, always=True)
            continue
        if module not in shapes:
            unexpected.append(stored)
            continue
        outputs, inputs = shapes[module]
        wanted = (own.r, inputs) if kind == _KINDS[0] else (outputs, own.r)
        if tuple(tensor.shape) != wanted:
            misfits.append(f"{stored} of shape {tuple(tensor.shape)}; expected {wanted}")
        parts.setdefault(module, {})[kind] = finite(stored, tensor, tensor, always=True)
    halves = [module for module, own_parts in parts.items() if len(own_parts) < len(_KINDS)]
    problems = (
        [f"has {len(unexpected)} tensors that the model has no place for ({few(unexpected)})"] if unexpected else []
    )
    problems += [f"has {few(misfits)}"] if misfits else []
    problems += [f"has one of lora_A and lora_B alone for {few(halves)}"] if halves else []
    problems += ["holds no LoRA weight"] if not parts else []
    if problems:
        raise CheckpointError(
            f"adapter {folder} {'; it '.join(problems)}: it belongs to another base model"
            f" (it names {quoted(own.base_model_name_or_path)})"
        )
    return Adapter(own, {name: Side(each[_KINDS[0]], each[_KINDS[1]]) for name, each in parts.items()}, saved)
