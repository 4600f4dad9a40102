"""Shard the decoder over processes by torch's FSDP2: each holds a part of every weight and gathers a block to run it.

What is sharded: the blocks, ln_f, embedding and head, where they are dense. What is not: the vision encoder, whose
frozen part is computed once an image; side paths, which are small and float32 where the base is bfloat16; and packed
words, which are no floats. Those are replicated, and the gradients of the trained ones summed (`parallel.Team`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qvl_runtime.errors import ConfigError
from qvl_runtime.finetune.network import Network
from qvl_runtime.finetune.options import FinetuneOptions


def shard(network: Network, options: FinetuneOptions, dtype: torch.dtype) -> None:
    """Shard a network in place, over all processes. Trained weights become float32, and are computed in `dtype`.

    With sharding "gradients", a weight that was gathered stays until its backward pass: less to send, and between steps
    only optimizer state, gradients and float32 weights are divided, as by DeepSpeed's stage 2. Raises `ConfigError` for
    packed weights: data parallel training replicates them.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if options.method == "qlora":
        raise ConfigError(
            f"sharding is {options.sharding!r}, and packed words cannot be sharded: use 'data', which replicates them"
        )
    replicated = set(network.visual.parameters())
    replicated |= {p for name, p in network.named_parameters() if ".adapter." in name}
    for parameter in network.parameters():
        if parameter not in replicated:
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data.to(dtype)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    modules: list[nn.Module] = [*network.blocks, network]
    for module in modules:
        fully_shard(
            module,
            mp_policy=policy,
            ignored_params=replicated,
            reshard_after_forward=options.sharding == "fsdp",
        )
    register_fsdp_forward_method(network, "predict")


def whole(tensor: Tensor) -> Tensor:
    """A tensor, gathered from all processes where it is sharded. Every process must call it."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is one part of a whole."""
    return hasattr(tensor, "full_tensor")


def put(target: Tensor, values: Tensor) -> None:
    """Copy whole values into a tensor that may be sharded. Every process must call it."""
    if not is_sharded(target):
        target.copy_(values)
        return
    from torch.distributed.tensor import distribute_tensor

    own: Any = target
    target.copy_(distribute_tensor(values.to(target.device, target.dtype), own.device_mesh, own.placements))
