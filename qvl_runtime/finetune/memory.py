"""The memory of a training step, computed before anything is loaded: two micro-batches run on torch's meta device.

Meta tensors have shapes and no numbers, so the real network, loss and backward pass run at any size, and every storage
that is alive is counted: with few layers, of which each more adds the same. Weights, masters and moments come
from the shapes. What an allocator holds beyond that, and the driver's own memory, are not in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qvl_kernels.reference import Packed
from qvl_kernels.util import cdiv
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.config.quantization import QuantizationConfig
from qvl_runtime.finetune.functions import Documents
from qvl_runtime.finetune.network import Network, Targets
from qvl_runtime.finetune.opening import build_network, prepare, training_dtype
from qvl_runtime.finetune.options import FinetuneOptions
from qvl_runtime.weights.packed_specs import decoder_groups

LAYERS = (2, 4)  # of decoder and ViT in the runs that are counted; each more adds the same


class TrainingMemory(NamedTuple):
    """Bytes at the peak of a step."""

    weights: int  # of the model in its dtype, packed ones included
    optimizer: int  # masters and moments, and side paths
    step: int  # the rest at the peak: activations, gradients, a chunk of logits

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that are alive, and their peak."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def training_memory(
    config: ModelConfig, options: FinetuneOptions, tokens: int, images: int = 1, micro_batches: int = 2
) -> TrainingMemory:
    """The bytes of a step whose micro-batches have `tokens` tokens, all of them learned, with `images` images."""
    options.check_model(config)
    few, more = LAYERS

    def at(blocks: int, vit: int) -> TrainingMemory:
        return _shallow_memory(_shallow(config, blocks, vit), options, tokens, images, micro_batches)

    base, blocks, vit = at(few, few), at(more, few), at(few, more)
    more_blocks, more_vit = config.num_hidden_layers - few, config.visual.layers - few
    parts = (
        start + ((block - start) * more_blocks + (layer - start) * more_vit) // (more - few)
        for start, block, layer in zip(base, blocks, vit, strict=True)
    )
    return TrainingMemory(*parts)


def _shallow_memory(
    config: ModelConfig, options: FinetuneOptions, tokens: int, images: int, micro_batches: int
) -> TrainingMemory:
    """The same for a model of few layers, all of which are run."""
    network = meta_network(config, options)
    live = _Live(list(network.parameters()))
    with live:
        for _ in range(micro_batches):
            _micro_batch(network, config, tokens, images)
    return TrainingMemory(_weights(network), _optimizer_bytes(network, options), live.peak)


def _shallow(config: ModelConfig, blocks: int, vit: int) -> ModelConfig:
    """The configuration with few layers."""
    return replace(config, num_hidden_layers=blocks, visual=replace(config.visual, layers=vit))


def meta_network(config: ModelConfig, options: FinetuneOptions) -> Network:
    """The network of a configuration without numbers, thawed and with side paths as `options` say."""
    dtype = training_dtype(options, config)
    with torch.device("meta"):
        state = {name: t.to(dtype) for name, t in Network(config).state_dict().items()}
    packed: dict[str, Packed] = {}
    if config.quantization is not None:
        for name, parts in decoder_groups(config):
            shapes = [state[f"{part}.weight"].shape for part in parts]
            biases = [state.get(f"{part}.bias") for part in parts]
            packed[name] = _meta_packed(config.quantization, sum(s[0] for s in shapes), shapes[0][1], biases[0])
    network = build_network(config, state, packed)
    prepare(network, options)
    return network.train()


def _meta_packed(quantization: QuantizationConfig, outputs: int, inputs: int, bias: Tensor | None) -> Packed:
    """A packed linear in the published layout, without numbers."""
    size = inputs if quantization.group_size == -1 else quantization.group_size
    per_word, groups = 32 // quantization.bits, cdiv(inputs, size)
    with torch.device("meta"):
        tensors = {
            "qweight": torch.empty(inputs // per_word, outputs, dtype=torch.int32),
            "qzeros": torch.empty(groups, outputs // per_word, dtype=torch.int32),
            "scales": torch.empty(groups, outputs, dtype=torch.float16),
        }
    if bias is not None:
        tensors["bias"] = bias
    return Packed("gptq", tensors, {"bits": quantization.bits, "zero_offset": 1})


def _weights(network: Network) -> int:
    from qvl_runtime.finetune.int4_linear import PackedLinear

    dense = sum(p.nbytes for name, p in network.named_parameters() if ".adapter." not in name)
    packed = [module.packed for module in network.modules() if isinstance(module, PackedLinear)]
    return dense + sum(tensor.nbytes for linear in packed for tensor in linear.tensors.values())


def _optimizer_bytes(network: Network, options: FinetuneOptions) -> int:
    """Two moments of each trained weight, masters of 16-bit ones, and the side paths themselves."""
    total = 0
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        narrow = parameter.dtype.itemsize == 2
        if narrow and options.masters == "bfloat16":
            total += 2 * parameter.nbytes
        else:
            total += (12 if narrow else 8) * parameter.numel()
        total += parameter.nbytes if ".adapter." in name else 0
    return total


def _micro_batch(network: Network, config: ModelConfig, tokens: int, images: int) -> None:
    visual, dtype = config.visual, network.visual.proj.dtype
    with torch.device("meta"):
        pixels = torch.empty(images, 3, visual.image_size, visual.image_size, dtype=dtype)
        ids, positions = (torch.empty(1, tokens, dtype=torch.int64) for _ in range(2))
        slots = torch.empty(images, 3, dtype=torch.int64)
        targets = Targets(*(torch.empty(tokens, dtype=torch.int64) for _ in range(2)))
        trained = any(parameter.requires_grad for parameter in network.visual.vit_parameters)
        with torch.set_grad_enabled(trained):
            patches = network.visual.patches(pixels)
        pool = any(parameter.requires_grad for parameter in network.visual.parameters())
        with torch.set_grad_enabled(pool):
            features = network.visual.pool(patches)
        del patches, pixels
        loss = network(ids, features, slots, positions, Documents((0, tokens)), targets).learned
    loss.backward()
