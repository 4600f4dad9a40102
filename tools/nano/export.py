"""From a training state to checkpoints in the published layout: bfloat16, and its GPTQ Int4 sibling."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from qvl_runtime.config import ModelConfig, QuantizationConfig
from qvl_runtime.weights.gptq import quantize_state
from qvl_runtime.weights.save import quantized_config, save_checkpoint

from .network import Nano
from .vocabulary import RANKS

GENERATION = {
    "chat_format": "chatml",
    "eos_token_id": RANKS,
    "pad_token_id": RANKS,
    "max_window_size": 6144,
    "max_new_tokens": 256,
    "do_sample": False,
    "top_k": 0,
    "top_p": 1.0,
}
TOKENIZER = {"model_max_length": 8192, "tokenizer_class": "QWenTokenizer"}
INT4 = QuantizationConfig(bits=4, group_size=64)


def export(run: Path, target: Path) -> list[Path]:
    """Write `target` and `target`_int4 from the averaged weights of a run's state.pt, in place of what is there."""
    raw = json.loads((run / "config.json").read_text())
    averaged = torch.load(run / "state.pt", weights_only=True, mmap=True)["average"]
    config = ModelConfig.from_dict(raw)
    model = Nano(config)
    model.load_state_dict(averaged, strict=False)
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}

    companions = run / "export"
    companions.mkdir(exist_ok=True)
    (companions / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
    (companions / "tokenizer_config.json").write_text(json.dumps(TOKENIZER, indent=2) + "\n")
    shutil.copyfile(run / "qwen.tiktoken", companions / "qwen.tiktoken")

    sibling = target.with_name(f"{target.name}_int4")
    packed = quantize_state({name: t.float() for name, t in state.items()}, config, INT4)
    for folder, tensors, settings in ((target, state, raw), (sibling, packed, quantized_config(raw, INT4))):
        shutil.rmtree(folder, ignore_errors=True)
        save_checkpoint(folder, tensors, settings, companions)
    return [target, sibling]
