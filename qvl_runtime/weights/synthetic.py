"""Models of the published sizes with random weights, made in memory: to measure speed and memory without a download."""

from __future__ import annotations

import math
from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING

from qvl_runtime.config.model import ModelConfig, QuantizationConfig, VisionConfig
from qvl_runtime.errors import ConfigError
from qvl_runtime.formats.layout import TensorSpec, expected_tensors
from qvl_runtime.weights.loader import Weights
from qvl_runtime.weights.packing import merge_dense, pack_decoder
from qvl_runtime.weights.shards import TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SYNTHETIC = ("qwen-vl-chat", "qwen-vl-chat-int4")
GROUP = 128  # inputs that share a scale, as in the published Int4 checkpoint
NOISE = 1 << 22  # random numbers that all tensors are tiled from: 9.6 billion would take minutes to draw


def synthetic_config(name: str, vocabulary: ModelConfig) -> ModelConfig:
    """The published sizes; the ids of images are those of `vocabulary`, whose tokenizer the model is used with."""
    if name not in SYNTHETIC:
        raise ConfigError(f"synthetic is {name!r}; supported are {' and '.join(SYNTHETIC)}")
    visual = VisionConfig(
        image_size=448,
        patch_size=14,
        width=1664,
        layers=48,
        heads=16,
        mlp_ratio=4.9231,
        output_dim=4096,
        image_start_id=vocabulary.visual.image_start_id,
    )
    return ModelConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        intermediate_size=22016,
        vocab_size=151936,
        seq_length=2048,
        visual=visual,
        dtype="bfloat16",
        quantization=QuantizationConfig(bits=4, group_size=GROUP) if name.endswith("int4") else None,
    )


class SyntheticState(MutableMapping[str, "Tensor"]):
    """The tensors that a configuration calls for, each made when it is asked for: a state that needs no memory yet.

    With `repeat_blocks` all blocks of a kind share the tensors of the first. What is read for a token is the same, and
    a dense model of 19 GB fits where it would not; weights that kernels lay out anew are separate all the same.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        repeat_blocks: bool = False,
        device: torch.device | str = "cpu",
        optional: bool = False,
    ) -> None:
        """optional: also what a checkpoint need not hold, and published ones do, such as `g_idx`."""
        import torch

        self._specs = {name: spec for name, spec in expected_tensors(config).items() if optional or not spec.optional}
        self._dtype, self._repeat = dtype, repeat_blocks
        self._made: dict[str, Tensor] = {}
        self._first: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(0)
        self._normal = torch.randn(NOISE, generator=generator).to(device)
        self._scaled = torch.empty_like(self._normal)  # one for all: new ones left 2.2 GiB of holes in the heap
        self._words = torch.randint(-(2**31), 2**31, (NOISE,), generator=generator).to(device, torch.int32)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._made:
            kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
            found = self._first.get(kind) if self._repeat and kind != name else None
            self._made[name] = self._make(name, self._specs[name]) if found is None else found
            if self._repeat and kind != name:
                self._first[kind] = self._made[name]
        return self._made[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._made[name] = value

    def __delitem__(self, name: str) -> None:
        self._made.pop(name, None)
        self._specs.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter([*self._specs])

    def __len__(self) -> int:
        return len(self._specs)

    def looks(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor that need not be made for it."""
        spec = self._specs[name]
        scales = "float16" if name.endswith(".scales") else str(self._dtype).removeprefix("torch.")
        return TensorInfo(spec.shape, "int32" if spec.packed else scales)

    def forget(self, name: str) -> None:
        """Give back a tensor's memory; asked for again it is made again."""
        self._made.pop(name, None)

    def _make(self, name: str, spec: TensorSpec) -> Tensor:
        """Values that keep activations near 1: norms of ones, no biases, weights of variance 1 / inputs."""
        import torch

        kind = name.rpartition(".")[2]
        if kind == "qzeros":
            return self._full(spec.shape, 0x77777777, torch.int32)  # 7 stored is 8
        if kind == "scales":  # a level's root mean square is 4.6
            groups = spec.shape[0]
            return self._full(spec.shape, 1 / (4.6 * math.sqrt(groups * GROUP)), torch.float16)
        if kind == "g_idx":
            return torch.arange(*spec.shape, dtype=torch.int32, device=self._words.device) // GROUP
        if spec.packed:
            return _tiled(self._words, spec.shape, torch.int32)
        if len(spec.shape) == 1:
            return self._full(spec.shape, float(kind == "weight"), self._dtype)
        scale = 1 / math.sqrt(math.prod(spec.shape[1:]))
        return _tiled(torch.mul(self._normal, scale, out=self._scaled), spec.shape, self._dtype)

    def _full(self, shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
        import torch

        return torch.full(shape, value, dtype=dtype, device=self._normal.device)


def synthetic_weights(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, repeat_blocks: bool = False
) -> Weights:
    """The weights of a random model, through the same door as a published checkpoint's: packed where it is quantized.

    Dense tensors are made when the model reads them.
    """
    from qvl_kernels import ops_for

    state = SyntheticState(config, dtype, repeat_blocks, device)
    packed = pack_decoder(state, config, ops_for(device))
    if device.type != "cpu":
        merge_dense(state, config)
    return Weights(state, packed)


def _tiled(noise: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = math.prod(shape)
    made = _empty(count, dtype, noise.device)
    for start in range(0, count, len(noise)):
        part = made[start : start + len(noise)]
        part.copy_(noise[: len(part)])
    return made.view(shape)


def _empty(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for `count` elements. On a CPU apart from the heap, as a checkpoint's tensors are views of its files.

    In the heap, what packing keeps of one tensor took the room of the next: at full size 3.6 GB while loading.
    """
    import torch

    from qvl_kernels.memory import mapping

    if device.type != "cpu" or count == 0:
        return torch.empty(count, dtype=dtype, device=device)
    return mapping(count * dtype.itemsize).view(dtype)
