"""Open a checkpoint as a trainable network: frozen weights are mapped, trained ones are copies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from qvl_kernels.reference import Packed
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.errors import ConfigError
from qvl_runtime.finetune.int4_linear import PackedLinear
from qvl_runtime.finetune.linears import Adaptable, Part
from qvl_runtime.finetune.lora import add_lora
from qvl_runtime.finetune.network import Block, Network
from qvl_runtime.finetune.options import FinetuneOptions
from qvl_runtime.weights.checkpoint import load_state
from qvl_runtime.weights.loader import load_weights
from qvl_runtime.weights.manifest import is_converted


def training_dtype(options: FinetuneOptions, config: ModelConfig) -> torch.dtype:
    """The dtype of weights and activations: bfloat16 for float16 checkpoints, too, as the ViT's residual overflows."""
    if options.dtype != "auto":
        return torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
    return torch.float32 if config.dtype == "float32" else torch.bfloat16


def open_network(folder: Path, config: ModelConfig, options: FinetuneOptions, device: torch.device) -> Network:
    """The network of a checkpoint folder with what `options` trains thawed, and side paths added.

    Raises `ConfigError` where method and checkpoint do not fit, and `CheckpointError` for damaged files.
    """
    options.check_model(config)
    if is_converted(folder):
        raise ConfigError(f"{folder} was converted for inference: fine-tune the checkpoint that it was converted from")
    dtype = training_dtype(options, config)
    if config.quantization is None:
        state: Mapping[str, Tensor] = load_state(folder, config, dtype, device)
        packed: Mapping[str, Packed] = {}
    else:
        state, packed, _ = load_weights(folder, config, dtype, device)
    network = build_network(config, state, packed)
    prepare(network, options)
    return network


def build_network(config: ModelConfig, state: Mapping[str, Tensor], packed: Mapping[str, Packed]) -> Network:
    """A network over these weights, without a copy: dense tensors by published name, packed ones by the model's."""
    with torch.device("meta"):
        network = Network(config)
    for name, linear in packed.items():
        _pack(network, name, PackedLinear(linear))
    own = {name: tensor for name, tensor in state.items() if name in network.state_dict()}
    network.load_state_dict(own, strict=True, assign=True)
    return network.requires_grad_(False)


def prepare(network: Network, options: FinetuneOptions) -> None:
    """Thaw what is trained: parts of the model, or side paths and whole modules. Thawed weights become copies."""
    network.requires_grad_(False)
    if options.uses_lora:
        add_lora(network, options.lora, options.seed)
    else:
        for module in _parts(network, options):
            module.requires_grad_(True)
        network.visual.attn_pool.pos_embed.requires_grad_(False)
    for parameter in network.parameters():
        if parameter.requires_grad and not parameter.is_meta:
            parameter.data = parameter.data.clone()
    network.checkpointing = network.visual.checkpointing = options.checkpointing


def _parts(network: Network, options: FinetuneOptions) -> list[nn.Module]:
    modules: list[nn.Module] = []
    for part in options.parts:
        if part == "decoder":
            modules += [*network.blocks, network.transformer["ln_f"]]
        elif part == "embedding" or (part == "head" and network.lm_head is None):
            modules.append(network.wte)
        elif part == "head":
            modules.append(network.get_submodule("lm_head"))
        elif part == "resampler":
            modules.append(network.visual.attn_pool)
        else:
            visual = network.visual
            modules += [visual.conv1, visual.ln_pre, visual.transformer]
            visual.positional_embedding.requires_grad_(True)
    return modules


def _pack(network: Network, name: str, linear: PackedLinear) -> None:
    """Put a packed linear where the model has it; w1 and w2 of a merged one keep their side paths."""
    parent, _, child = name.rpartition(".")
    module = network.get_submodule(parent)
    if child != "up_gate":
        setattr(module, child, linear)
        return
    block = network.get_submodule(parent.removesuffix(".mlp"))
    if not isinstance(block, Block):
        raise TypeError(f"{parent} belongs to {type(block).__name__}; expected a block of the decoder")
    mlp = block.mlp
    halves: list[Adaptable] = [Part(linear.in_features, linear.out_features // 2) for _ in range(2)]
    mlp.up_gate = linear
    mlp.w1, mlp.w2 = halves
