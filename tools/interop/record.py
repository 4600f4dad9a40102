"""What other libraries write into their configurations, kept as cases of the tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qvl_kernels.reference import unpack_rows
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.formats.gptq import GPTQLinear
from qvl_runtime.weights.checkpoint import Checkpoint
from tools.interop.float_checkpoint import CONFIG

LINEAR = "transformer.h.1.mlp.c_proj"
_PRIVATE = ("dataset", "offload_to_disk_path", "model_name_or_path", "_name_or_path", "visual")  # of this machine


def record(path: Path, folders: Mapping[str, Path]) -> None:
    """Write the cases of all checkpoints below the folders, {library: folder}, as JSON."""
    cases = []
    for library, folder in folders.items():
        for checkpoint in sorted(path for path in folder.iterdir() if (path / "config.json").is_file()):
            cases.append({"library": library, "kind": checkpoint.name, **_case(checkpoint)})
    path.write_text(json.dumps(cases, indent=1, sort_keys=True) + "\n")


def _case(folder: Path) -> dict[str, Any]:
    """Both configurations without what is the model's own, and facts of one linear."""
    config = _public(json.loads((folder / "config.json").read_text()))
    added = {key: value for key, value in config.items() if CONFIG.get(key) != value}
    (file,) = folder.glob("*.safetensors")
    state = load_file(file)
    quantize = folder / "quantize_config.json"
    model = ModelConfig.from_folder(folder)
    if model.quantization is None:
        raise ValueError(f"{folder} is not quantized")
    offset = GPTQLinear.from_state(Checkpoint.open(folder, model), LINEAR, model.quantization).zero_offset
    return {
        "stored": "gptq" if offset else "gptq_v2",
        "config": added,
        "quantize_config": _public(json.loads(quantize.read_text())) if quantize.is_file() else None,
        "file": file.name,
        "linear": _facts({name.removeprefix(f"{LINEAR}."): t for name, t in state.items() if name.startswith(LINEAR)}),
        "norm": str(state["transformer.ln_f.weight"].dtype).removeprefix("torch."),
    }


def _facts(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Dtypes and shapes, the range of the stored zero points, and whether groups are in order."""
    bits = tensors["qweight"].shape[0] * 32 // len(tensors["g_idx"])
    zeros = unpack_rows(tensors["qzeros"].t(), bits)
    g_idx = tensors["g_idx"]
    return {
        "tensors": {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in sorted(tensors.items())},
        "zero_points": [int(zeros.min()), int(zeros.max())],
        "in_order": bool((g_idx.sort().values == g_idx).all()),
    }


def _public(value: Any) -> Any:
    """A configuration without paths and data of the machine that wrote it."""
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items() if key not in _PRIVATE}
    return value
