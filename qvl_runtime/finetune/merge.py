"""Merge an adapter into its base: W + scale * B A in float32, rounded once, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qvl_kernels.reference import gptq_dequantize
from qvl_runtime.config.checks import read_json
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.errors import ConfigError
from qvl_runtime.formats.adapter import Adapter, Side
from qvl_runtime.formats.gptq import GPTQLinear
from qvl_runtime.formats.layout import decoder_linears, expected_tensors
from qvl_runtime.weights.adapter import read_adapter
from qvl_runtime.weights.checkpoint import Checkpoint
from qvl_runtime.weights.manifest import is_converted
from qvl_runtime.weights.partial import check_destination, write_folder
from qvl_runtime.weights.save import copy_companions, write_config, write_shards
from qvl_runtime.weights.tensor_info import TensorInfo

_QUANTIZED = ("quantization_config", "dtype")  # keys of config.json that a float version lacks


class Change(NamedTuple):
    """What merging changed."""

    linears: int  # with an update
    replaced: int  # modules that the adapter has whole
    largest: float  # absolute change of a weight, after rounding
    mean: float  # of the weights of changed linears
    unchanged: float  # share of those weights that rounding left as they were


def merged(weight: Tensor, side: Side, scale: float) -> Tensor:
    """A weight [out, in] with an update: the sum is made in float32 and rounded once, to the weight's dtype."""
    update = side.b.float() @ side.a.float()
    return torch.add(weight.float(), update, alpha=scale).to(weight.dtype)


def merge(source: Path, adapter_folder: Path, destination: Path) -> Change:
    """Write the float checkpoint `source` with an adapter merged into it as `destination`, all of it or nothing.

    Names, shapes and dtypes stay as stored, padding rows of the vocabulary included. Raises `ConfigError` for a
    quantized checkpoint, and `CheckpointError` for an adapter of another base.
    """
    source = Path(source)
    config = _checked(source, destination)
    if config.quantization is not None:
        raise ConfigError(
            f"{source} is quantized, so an update cannot be added to its weights: serve the adapter next to it "
            "(Engine(..., adapters={name: folder})), merge it into the float checkpoint, or quantize their sum "
            "with --requantize"
        )
    adapter = read_adapter(adapter_folder, config)
    checkpoint = Checkpoint.open(source, config)
    infos = {name: checkpoint.info(name) for name in expected_tensors(config) if name in checkpoint}
    tally = _Tally()

    def read(name: str) -> list[Tensor]:
        return [_new_tensor(name, checkpoint.tensor(name), adapter, tally)]

    def write(folder: Path) -> None:
        write_shards(folder, infos, read)
        write_config(folder, read_json(source / "config.json"))
        copy_companions(source, folder)

    write_folder(destination, "qvl merge", write)
    return tally.change()


def write_float(source: Path, adapter: Adapter, folder: Path) -> None:
    """Write a quantized checkpoint as a float one in bfloat16, dequantized, with an adapter added to its linears."""
    config = ModelConfig.from_folder(source)
    quantization = config.quantization
    if quantization is None:
        raise ConfigError(f"{source} is not quantized")
    checkpoint = Checkpoint.open(source, config)
    linears = decoder_linears(config)
    raw = {key: value for key, value in read_json(source / "config.json").items() if key not in _QUANTIZED}
    raw |= {"bf16": True, "fp16": False, "fp32": False, "torch_dtype": "bfloat16"}
    specs = expected_tensors(ModelConfig.from_dict(raw))
    infos = {name: TensorInfo(spec.shape, "bfloat16") for name, spec in specs.items()}

    def read(name: str) -> list[Tensor]:
        module, _, kind = name.rpartition(".")
        if module not in linears or kind != "weight":
            stored = adapter.saved.get(module) if kind == "weight" else None
            return [(checkpoint.tensor(name) if stored is None else stored).bfloat16()]
        own = GPTQLinear.from_state(checkpoint, module, quantization)
        dense = gptq_dequantize(own.qweight, own.qzeros, own.scales, own.g_idx, own.bits, own.zero_offset)
        side = adapter.sides.get(module)
        return [(dense if side is None else merged(dense, side, adapter.config.scale)).bfloat16()]

    def write(partial: Path) -> None:
        write_shards(partial, infos, read)
        write_config(partial, raw)
        copy_companions(source, partial)

    write_folder(folder, "qvl merge", write)


def merged_state(state: Mapping[str, Tensor], adapter: Adapter, keep: Callable[[str], bool]) -> dict[str, Tensor]:
    """A dense state with the parts of an adapter merged whose module `keep` does not leave to a side path."""
    changed = dict(state)
    for module, weight in adapter.saved.items():
        name = f"{module}.weight"
        changed[name] = weight.to(state[name])
    for module, side in adapter.sides.items():
        name = f"{module}.weight"
        if not keep(module):
            near = Side(*(part.to(state[name].device) for part in side))
            changed[name] = merged(state[name], near, adapter.config.scale)
    return changed


def _checked(source: Path, destination: Path) -> ModelConfig:
    check_destination(source, destination)
    if is_converted(source):
        raise ConfigError(f"{source} was converted for inference: merge into the checkpoint that it was converted from")
    return ModelConfig.from_folder(source)


def _new_tensor(name: str, stored: Tensor, adapter: Adapter, tally: _Tally) -> Tensor:
    module, _, kind = name.rpartition(".")
    if kind != "weight":
        return stored
    if module in adapter.saved:
        tally.replaced += 1
        return adapter.saved[module].to(stored.dtype)
    side = adapter.sides.get(module)
    if side is None:
        return stored
    result = merged(stored, side, adapter.config.scale)
    tally.add(stored, result)
    return result


class _Tally:
    """Counts what merging changed."""

    def __init__(self) -> None:
        self.linears = self.replaced = self.weights = self.same = 0
        self.largest = self.total = 0.0

    def add(self, before: Tensor, after: Tensor) -> None:
        """Count one linear."""
        change = (after.float() - before.float()).abs()
        self.linears += 1
        self.weights += change.numel()
        self.same += int((change == 0).sum())
        self.largest = max(self.largest, float(change.max()))
        self.total += float(change.double().sum())

    def change(self) -> Change:
        """The counts as a result."""
        weights = max(1, self.weights)
        return Change(self.linears, self.replaced, self.largest, self.total / weights, self.same / weights)
