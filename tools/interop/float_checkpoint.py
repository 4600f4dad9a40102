"""A small float checkpoint with the published names, for quantizers of other projects and for ours."""

from __future__ import annotations

import json
import shutil
from base64 import b64encode
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.formats.layout import expected_tensors
from tools.interop.library import CODE

CONFIG: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {"AutoConfig": "modeling_qwen.QWenConfig", "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
    "model_type": "qwen",
    "fp16": True,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_channels": 64,
    "intermediate_size": 512,
    "vocab_size": 480,
    "seq_length": 512,
    "tie_word_embeddings": False,
    "visual": {
        "image_size": 28,
        "patch_size": 7,
        "width": 32,
        "layers": 1,
        "heads": 2,
        "mlp_ratio": 2.0,
        "output_dim": 128,
        "image_start_id": 470,
        "n_queries": 16,
        "positional_rows": 16,
    },
}
_VISUAL = "transformer.visual."


def make_float(folder: Path) -> None:
    """Write random weights in float16, a vocabulary of bytes, and the code of the decoder for transformers."""
    folder.mkdir(parents=True)
    generator, state = torch.Generator().manual_seed(0), {}
    for name, spec in expected_tensors(ModelConfig.from_dict(CONFIG)).items():
        scale = 1.0 if len(spec.shape) == 1 else spec.shape[-1] ** -0.5
        state[name] = (torch.randn(spec.shape, generator=generator) * scale).half()
    shapes = {name.removeprefix(_VISUAL): list(t.shape) for name, t in state.items() if name.startswith(_VISUAL)}
    visual = {**CONFIG["visual"], "stored_shapes": shapes}  # for the code in transformers, which has no vision encoder
    (folder / "config.json").write_text(json.dumps({**CONFIG, "visual": visual}, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"chat_format": "chatml", "eos_token_id": 256}))
    ranks = (f"{b64encode(bytes([value])).decode()} {value}" for value in range(256))
    (folder / "qwen.tiktoken").write_text("\n".join(ranks))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    add_code(folder)


def add_code(folder: Path) -> None:
    """Copy the decoder's code for transformers into a folder."""
    shutil.copyfile(Path(__file__).with_name(CODE), folder / CODE)
