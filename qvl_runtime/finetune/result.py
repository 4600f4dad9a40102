"""Write what was trained: a checkpoint in the published layout, or an adapter in peft's."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from qvl_kernels.util import dtype_name
from qvl_runtime.config.checks import read_json
from qvl_runtime.finetune.lora import adapter_of
from qvl_runtime.finetune.network import Network
from qvl_runtime.finetune.options import FinetuneOptions
from qvl_runtime.weights.adapter import write_adapter
from qvl_runtime.weights.save import copy_companions, write_config, write_shards
from qvl_runtime.weights.tensor_info import TensorInfo

_FLAGS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def write_result(network: Network, options: FinetuneOptions, source: Path, folder: Path) -> None:
    """Fill an existing folder with the result. source: the checkpoint that the run started from."""
    if options.uses_lora:
        write_adapter(folder, adapter_of(network, options.lora), network.c)
        return
    state: dict[str, Tensor] = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    infos = {name: TensorInfo(tuple(t.shape), dtype_name(t.dtype)) for name, t in state.items()}
    write_shards(folder, infos, lambda name: [state[name].cpu()])
    dtype = dtype_name(network.wte.weight.dtype)
    flags = {flag: flag == _FLAGS[dtype] for flag in _FLAGS.values()}
    write_config(folder, {**read_json(source / "config.json"), **flags, "torch_dtype": dtype})
    copy_companions(source, folder)
