"""The options of a quantization, and the estimate of what it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from qvl_runtime.config.checks import require_choice, require_positive
from qvl_runtime.config.quantization import QuantizationConfig
from qvl_runtime.errors import ConfigError
from qvl_runtime.quantize.block import Method
from qvl_runtime.quantize.solver import Order


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """How to quantize a checkpoint, and how much to calibrate on. Raises `ConfigError` for unsupported values."""

    method: Method = "gptq"
    bits: int = 4
    group_size: int = 128  # inputs per scale; -1: all of them
    sym: bool = True
    order: Order = "static"  # of rounding; full: desc_act in the published format
    damping: float = 0.01
    drift: float = 0.5  # share of the error of a linear's inputs, from rounding earlier layers, to compensate
    samples: int = 64  # conversations, an eighth of which is held out to measure errors on
    max_tokens: int = 512  # longer conversations are cut

    def __post_init__(self) -> None:
        require_choice("method", self.method, ("gptq", "rtn"))
        require_choice("bits", self.bits, (4, 8))
        require_choice("group size", self.group_size, (32, 64, 128, -1))
        require_choice("activation order", self.order, ("none", "static", "full"))
        require_positive(self, "", "damping", "samples", "max_tokens")
        if not 0 <= self.drift <= 1:
            raise ConfigError(f"drift is {self.drift:g}; expected a share from 0, as GPTQ was published, to 1")

    @property
    def streams(self) -> int:
        """Residual streams to compute: that of the quantized model, and that of the float model to compensate drift."""
        return 2 if self.method == "gptq" and self.drift else 1

    @property
    def quantization(self) -> QuantizationConfig:
        """The quantization section of the new checkpoint's config."""
        full = self.order == "full" and self.method == "gptq"
        return QuantizationConfig(self.bits, self.group_size, desc_act=full, sym=self.sym)


class Estimate(NamedTuple):
    """The size of a quantization and the memory and disk that it needs, known before it starts."""

    tokens: int  # to calibrate on, image tokens included
    conversations: int
    shortened: int  # conversations that were cut to `max_tokens`
    memory: int  # approximate bytes beyond the program itself
    disk: int  # bytes of the result and the intermediate files
    result: int  # bytes of the new checkpoint
