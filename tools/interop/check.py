"""Compare the linears of a checkpoint as this project reads them with what another library computed from it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from qvl_kernels.reference import gptq_linear
from qvl_runtime import Engine, SamplingParams
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.formats.gptq import GPTQLinear
from qvl_runtime.formats.layout import decoder_linears
from qvl_runtime.weights.checkpoint import Checkpoint
from tools.interop.library import inputs, outputs_of

ROUNDINGS = 4  # of a library's dtype, relative: of a weight, a product, a sum and the bias


class Compared(NamedTuple):
    """The largest errors over the linears of a checkpoint, relative to the outputs' norm."""

    ours_to_theirs: float
    bound: float  # of that: what rounding in the library's dtype explains
    to_float: float  # ours to the float model: what quantization costs, far below 1
    notes: tuple[str, ...]  # what loading said

    @property
    def equal(self) -> bool:
        """Whether both read the same weights, and not noise."""
        return self.ours_to_theirs <= self.bound and self.to_float < 0.5


def compare(folder: Path, float_folder: Path) -> Compared:
    """Compare all linears, and load the folder as a user does. Raises `QVLError` where it is refused."""
    engine = Engine(folder, device="cpu", max_model_len=256)
    engine.generate("a", SamplingParams(max_tokens=2, temperature=0))
    config = ModelConfig.from_folder(folder)
    checkpoint, floats = Checkpoint.open(folder, config), load_file(float_folder / "model.safetensors")
    theirs = load_file(outputs_of(folder))
    worst = to_float = bound = 0.0
    for name in decoder_linears(config):
        x = inputs(floats[f"{name}.weight"].shape[1])
        expected = torch.nn.functional.linear(x, floats[f"{name}.weight"].float(), _bias(floats, name))
        ours = run(checkpoint, name, config, x)
        worst = max(worst, _error(ours, theirs[name].float()))
        to_float = max(to_float, _error(ours, expected))
        bound = max(bound, ROUNDINGS * torch.finfo(theirs[name].dtype).eps)
    return Compared(worst, bound, to_float, tuple(engine.report()["model"]["notes"]))


def run(checkpoint: Checkpoint, name: str, config: ModelConfig, x: Tensor) -> Tensor:
    """One linear in float32, from the definition of the op."""
    if config.quantization is None:
        raise ValueError(f"{checkpoint.folder} is not quantized")
    linear = GPTQLinear.from_state(checkpoint, name, config.quantization)
    bias = None if linear.bias is None else linear.bias.float()
    packed = (linear.qweight, linear.qzeros, linear.scales, linear.g_idx, linear.bits, linear.zero_offset)
    return gptq_linear(x, *packed, bias)


def _bias(state: dict[str, Tensor], name: str) -> Tensor | None:
    bias = state.get(f"{name}.bias")
    return None if bias is None else bias.float()


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
