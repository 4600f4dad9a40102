"""Models of the published sizes with random weights, to measure speed and memory without a download."""

from __future__ import annotations

import math
from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING

from qvl_kernels.util import dtype_name
from qvl_runtime.config.model import ModelConfig, VisionConfig
from qvl_runtime.config.quantization import QuantizationConfig
from qvl_runtime.errors import ConfigError
from qvl_runtime.formats.layout import TensorSpec, expected_tensors
from qvl_runtime.weights.loader import EMBEDDING, Weights
from qvl_runtime.weights.packing import merge_dense, pack_decoder
from qvl_runtime.weights.tensor_info import TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SYNTHETIC = ("qwen-vl-chat", "qwen-vl-chat-int4")
GROUP = 128  # inputs per scale, as in the published Int4 checkpoint
NOISE = 1 << 22  # random numbers that tile all tensors: drawing 9.6 billion would take minutes


def synthetic_config(name: str, vocabulary: ModelConfig) -> ModelConfig:
    """A configuration of a published size, with the image ids of `vocabulary`, whose tokenizer the model uses."""
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
    """The tensors of a configuration, each created when it is first read: a state that needs no memory in advance.

    With `repeat_blocks` all blocks of a kind share the tensors of the first. The bytes read per token are the same, and
    a dense model of 19 GB fits into less memory; weights that kernels repack are separate nevertheless.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        repeat_blocks: bool = False,
        device: torch.device | str = "cpu",
        optional: bool = False,
    ) -> None:
        """optional: include tensors that a checkpoint may omit and published ones contain, such as `g_idx`."""
        import torch

        self._specs = {name: spec for name, spec in expected_tensors(config).items() if optional or not spec.optional}
        self._dtype, self._repeat = dtype, repeat_blocks
        self._tensors: dict[str, Tensor] = {}
        self._first: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(0)
        self._normal = torch.randn(NOISE, generator=generator).to(device)
        self._scaled = torch.empty_like(self._normal)  # reused: new ones left 2.2 GiB of holes in the heap
        self._words = torch.randint(-(2**31), 2**31, (NOISE,), generator=generator).to(device, torch.int32)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
            first = self._first.get(kind) if self._repeat and kind != name else None
            self._tensors[name] = self._create(name, self._specs[name]) if first is None else first
            if self._repeat and kind != name:
                self._first[kind] = self._tensors[name]
        return self._tensors[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._tensors[name] = value

    def __delitem__(self, name: str) -> None:
        self._tensors.pop(name, None)
        self._specs.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter([*self._specs])

    def __len__(self) -> int:
        return len(self._specs)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor, without creating it."""
        spec = self._specs[name]
        scales = "float16" if name.endswith(".scales") else dtype_name(self._dtype)
        return TensorInfo(spec.shape, "int32" if spec.packed else scales)

    def forget(self, name: str) -> None:
        """Free a tensor; the next read creates it again."""
        self._tensors.pop(name, None)

    def _create(self, name: str, spec: TensorSpec) -> Tensor:
        """Values that keep activations near 1: norms of one, biases of zero, weights of variance 1 / inputs."""
        import torch

        kind = name.rpartition(".")[2]
        if kind == "qzeros":
            return self._full(spec.shape, 0x77777777, torch.int32)  # a stored 7 is zero point 8
        if kind == "scales":  # the root mean square of code - zero is 4.6
            groups = spec.shape[0]
            return self._full(spec.shape, 1 / (4.6 * math.sqrt(groups * GROUP)), torch.float16)
        if kind == "g_idx":
            return torch.arange(*spec.shape, dtype=torch.int32, device=self._words.device) // GROUP
        if spec.packed:
            return _tiled(self._words, spec.shape, torch.int32)
        if len(spec.shape) == 1:
            return self._full(spec.shape, float(kind == "weight"), self._dtype)
        scale = 1 / math.sqrt(math.prod(spec.shape[1:]))
        noise = torch.mul(self._normal, scale, out=self._scaled)
        if name == EMBEDDING and noise.device.type == "cpu":
            return _mapped(noise, spec.shape, self._dtype)
        return _tiled(noise, spec.shape, self._dtype)

    def _full(self, shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
        import torch

        return torch.full(shape, value, dtype=dtype, device=self._normal.device)


def synthetic_weights(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, repeat_blocks: bool = False
) -> Weights:
    """The weights of a random model, packed where it is quantized, as `load_weights` returns those of a checkpoint.

    Dense tensors are created when the model reads them.
    """
    from qvl_kernels import ops_for

    state = SyntheticState(config, dtype, repeat_blocks, device)
    packed = pack_decoder(state, config, ops_for(device))
    if device.type != "cpu":
        merge_dense(state, config)
    return Weights(state, packed)


def _tiled(noise: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = math.prod(shape)
    tensor = _empty(count, dtype, noise.device)
    for start in range(0, count, len(noise)):
        part = tensor[start : start + len(noise)]
        part.copy_(noise[: len(part)])
    return tensor.view(shape)


def _mapped(noise: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Like `_tiled`, in memory like a mapped file: of a checkpoint's table, only the rows that are read are resident.

    It counted as a whole, 1.24 GB at full size.
    """
    from qvl_kernels.memory import repeated

    memory = repeated(noise.to(dtype), math.prod(shape) * dtype.itemsize)
    return _tiled(noise, shape, dtype) if memory is None else memory.view(dtype).view(shape)


def _empty(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized tensor of `count` elements; on a CPU outside the heap, like tensors mapped from files.

    In the heap, small results of packing fragmented the memory of the next tensor: at full size 3.6 GB while loading.
    """
    import torch

    from qvl_kernels.memory import mapping

    if device.type != "cpu" or count == 0:
        return torch.empty(count, dtype=dtype, device=device)
    return mapping(count * dtype.itemsize).view(dtype)
