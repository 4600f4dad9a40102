"""Write what was trained: a checkpoint in the published layout, or an adapter in peft's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from qvl_kernels.util import dtype_name
from qvl_runtime.config.checks import read_json
from qvl_runtime.finetune.lora import adapter_of
from qvl_runtime.finetune.network import Network
from qvl_runtime.finetune.options import FinetuneOptions
from qvl_runtime.finetune.sharded import whole
from qvl_runtime.weights.adapter import write_adapter
from qvl_runtime.weights.save import copy_companions, write_config, write_shards
from qvl_runtime.weights.tensor_info import TensorInfo

_FLAGS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def result_tensors(network: Network, options: FinetuneOptions, keep: bool) -> dict[str, Tensor]:
    """The weights of a checkpoint as they are written, on the CPU; empty for LoRA, and where `keep` is false.

    Every process must call it: sharded weights are gathered, one after another.
    """
    if options.uses_lora:
        return {}
    dtype, state = network.visual.proj.dtype, dict[str, Tensor]()
    for name, tensor in network.state_dict().items():
        gathered = whole(tensor.detach())
        if keep:
            state[name] = gathered.to("cpu", dtype)
    return state


def write_result(
    network: Network, state: Mapping[str, Tensor], options: FinetuneOptions, source: Path, folder: Path
) -> None:
    """Fill an existing folder with the result.

    state: of `result_tensors`. source: the checkpoint that the run started from.
    """
    if options.uses_lora:
        write_adapter(folder, adapter_of(network, options.lora), network.c)
        return
    infos = {name: TensorInfo(tuple(t.shape), dtype_name(t.dtype)) for name, t in state.items()}
    write_shards(folder, infos, lambda name: [state[name]])
    dtype = infos["transformer.wte.weight"].dtype
    flags = {flag: flag == _FLAGS[dtype] for flag in _FLAGS.values()}
    write_config(folder, {**read_json(source / "config.json"), **flags, "torch_dtype": dtype})
    copy_companions(source, folder)
