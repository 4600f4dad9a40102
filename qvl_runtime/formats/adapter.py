"""What a LoRA adapter is: its settings, and the two factors of each linear's update.

The update of a linear is scale * B A, with scale = lora_alpha / r (Hu et al. 2021), or lora_alpha / sqrt(r) for rslora.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.errors import ConfigError, quoted
from qvl_runtime.formats.layout import decoder_linears, expected_tensors

if TYPE_CHECKING:
    from torch import Tensor


class Side(NamedTuple):
    """The update of one linear: scale * b a."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The part of `adapter_config.json` that is used, with the defaults of the published finetune.py."""

    r: int = 64
    lora_alpha: float = 16
    lora_dropout: float = 0.05
    target_modules: tuple[str, ...] = ("c_attn", "attn.c_proj", "w1", "w2")
    modules_to_save: tuple[str, ...] = ()  # by the last part of their name: wte, lm_head
    use_rslora: bool = False
    base_model_name_or_path: str = ""  # a name, never a path of this machine

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or not 0 < self.r <= 65536:
            raise ConfigError(f"the LoRA rank r is {quoted(self.r)}; expected a whole number from 1 to 65536")
        if not isinstance(self.lora_alpha, (int, float)) or not math.isfinite(self.lora_alpha) or self.lora_alpha <= 0:
            raise ConfigError(f"lora_alpha is {quoted(self.lora_alpha)}; expected a number above 0")
        if not isinstance(self.lora_dropout, (int, float)) or not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout is {quoted(self.lora_dropout)}; expected at least 0 and below 1")
        if not self.target_modules:
            raise ConfigError("target_modules is empty; expected names such as c_attn, attn.c_proj, w1, w2")

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class Adapter(NamedTuple):
    """An adapter in memory."""

    config: AdapterConfig
    sides: dict[str, Side]  # by the published name of the linear
    saved: dict[str, Tensor]  # weights that replace the base's, by the module's published name


def matches(name: str, target: str) -> bool:
    """Whether a module's name is one that `target` means: itself, or the end of it after a dot."""
    return name == target or name.endswith(f".{target}")


def shape_hash(config: ModelConfig) -> str:
    """SHA-256 of the shapes of a model, quantized or not: adapters fit models with the same one."""
    shapes = {name: list(shape) for name, shape in linears_of(config).items()}
    vocabulary = [config.vocab_size, config.hidden_size, config.rotary_emb_base, config.kv_channels]
    return hashlib.sha256(json.dumps([shapes, vocabulary], sort_keys=True).encode()).hexdigest()


def linears_of(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Every linear that may have a side path: {published name: (out, in)}."""
    shapes = dict(decoder_linears(config))
    for name, spec in expected_tensors(config).items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and len(spec.shape) == 2 and module not in ("transformer.wte",):
            shapes.setdefault(module, (spec.shape[0], spec.shape[1]))
    return shapes
