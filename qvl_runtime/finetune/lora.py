"""LoRA on the trainable network: which linears get a side path, and what else is trained with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from qvl_runtime.errors import ConfigError, quoted
from qvl_runtime.finetune.linears import Adaptable, SidePath
from qvl_runtime.finetune.network import Network
from qvl_runtime.formats.adapter import Adapter, AdapterConfig, Side, matches

SAVED_NAMES = {"wte": "transformer.wte", "lm_head": "lm_head"}


def adaptable(network: Network) -> Iterator[tuple[str, Adaptable]]:
    """The linears that can have a side path, by their published name."""
    for name, module in network.named_modules():
        if isinstance(module, Adaptable) and not name.endswith("mlp.up_gate"):
            yield name, module


def add_lora(network: Network, config: AdapterConfig, seed: int = 0) -> None:
    """Freeze the network, give the linears that `config` targets a side path, and thaw `modules_to_save`.

    Raises `ConfigError` for a target that matches nothing.
    """
    network.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    unmatched = set(config.target_modules)
    for name, module in adaptable(network):
        matched = [target for target in config.target_modules if matches(name, target)]
        if not matched or name == "lm_head":
            continue
        unmatched -= set(matched)
        side = SidePath(module.in_features, module.out_features, config.r, config.scale, config.lora_dropout)
        if not side.lora_A.is_meta:
            side.start(generator)
        module.adapter = side.to(network.wte.weight.device)
    if unmatched:
        raise ConfigError(
            f"the LoRA targets {', '.join(map(quoted, sorted(unmatched)))} match no linear of the model; expected "
            "names such as c_attn, attn.c_proj, w1, w2, mlp.c_proj or attn.in_proj"
        )
    for saved in saved_modules(network, config.modules_to_save):
        saved.requires_grad_(True)


def saved_modules(network: Network, names: Sequence[str]) -> list[nn.Module]:
    """The modules that are trained whole. Raises `ConfigError` for one that is not supported."""
    unknown = [name for name in names if name not in SAVED_NAMES]
    if unknown or ("lm_head" in names and network.lm_head is None):
        raise ConfigError(
            f"modules_to_save has {quoted((unknown or ['lm_head'])[0])}; supported are wte and, unless it is tied to "
            "wte, lm_head"
        )
    return [network.wte if name == "wte" else network.get_submodule("lm_head") for name in names]


def adapter_of(network: Network, config: AdapterConfig) -> Adapter:
    """What was trained, as an adapter; its tensors are those of the network."""
    sides = {
        name: Side(module.adapter.lora_A.detach(), module.adapter.lora_B.detach())
        for name, module in adaptable(network)
        if module.adapter is not None
    }
    names = {"wte": network.wte, "lm_head": network.lm_head}
    saved: dict[str, Tensor] = {}
    for name in config.modules_to_save:
        module = names[name]
        if module is not None:
            saved[SAVED_NAMES[name]] = module.weight.detach()
    return Adapter(config, sides, saved)


def load_adapter(network: Network, adapter: Adapter) -> None:
    """Add the side paths of an adapter with its weights, to train on from it."""
    add_lora(network, adapter.config)
    modules = dict(network.named_modules())
    with torch.no_grad():
        for name, side in adapter.sides.items():
            path = modules[name].adapter
            if not isinstance(path, SidePath):
                raise ConfigError(f"the adapter has {quoted(name)}, which its own target_modules do not name")
            path.lora_A.copy_(side.a)
            path.lora_B.copy_(side.b)
        for name, weight in adapter.saved.items():
            module = modules[name]
            module.weight = nn.Parameter(weight.to(module.weight, copy=True))
