"""`qvl info`: versions, device, kernels, model size, and what each missing optional part costs."""

from __future__ import annotations

import math
import platform
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qvl_runtime.cli.options import AsJson, Debug, ModelOptions
from qvl_runtime.cli.terminal import print_json, size

if TYPE_CHECKING:
    from qvl_runtime.config.model import ModelConfig

PACKAGES = ("qvl-runtime", "torch", "numpy", "safetensors", "tiktoken", "Pillow", "huggingface_hub", "triton")
ITEM_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4}
PARTS = (  # a tensor belongs to the first part with a matching prefix
    ("resampler", ("transformer.visual.attn_pool.", "transformer.visual.ln_post.", "transformer.visual.proj")),
    ("vision encoder", ("transformer.visual.",)),
    ("embedding", ("transformer.wte.",)),
    ("decoder", ("transformer.",)),
    ("head", ("lm_head.",)),
)


class Check(NamedTuple):
    """One optional part of the installation."""

    part: str
    found: bool
    cost: str  # what is lost without it, and how to get it


def info(*, models: ModelOptions, as_json: AsJson = False, debug: Debug = False) -> int:
    """Show versions, device, kernels and model size, and the cost of missing optional parts.

    Reads no weights, so it is quick for a model of any size.

    [cyan]qvl info[/cyan]

    [cyan]qvl info --model Qwen/Qwen-VL-Chat-Int4 --json[/cyan]
    """
    report = info_report(models)
    if as_json:
        print_json(report, indent=2)
    else:
        show_info(report)
    return 0


def info_report(models: ModelOptions) -> dict[str, Any]:
    """Versions, device, kernels, model and optional parts as plain data. Reads only the headers of weight files."""
    from qvl_kernels import report
    from qvl_runtime.host import choose_device, device_name, total_memory

    device = choose_device(models.device)
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "device": {"name": device_name(device), "memory_bytes": total_memory(device)},
        "kernels": report(device),
        "model": model_summary(models.folder()),
        "checks": [check._asdict() for check in _checks()],
    }


def model_summary(folder: Path) -> dict[str, Any]:
    """Dimensions of the model in a folder, and parameters and bytes by part, from the headers of its weight files.

    A quantized matrix counts as its unpacked parameters; its scales, zero points and g_idx count only as bytes.
    """
    import torch

    from qvl_runtime.config.model import ModelConfig
    from qvl_runtime.formats.layout import decoder_linears
    from qvl_runtime.model.cache_layout import bytes_per_token
    from qvl_runtime.weights.checkpoint import Checkpoint

    config = ModelConfig.from_folder(folder)
    checkpoint = Checkpoint.open(folder, config)
    packed = {f"{name}.qweight": shape for name, shape in decoder_linears(config).items()}
    auxiliary = (".qzeros", ".scales", ".g_idx")
    parts = {name: {"parameters": 0, "bytes": 0} for name, _ in PARTS}
    for name in checkpoint.names:
        info = checkpoint.info(name)
        part = parts[next(part for part, prefixes in PARTS if name.startswith(prefixes))]
        part["parameters"] += 0 if name.endswith(auxiliary) else math.prod(packed.get(name, info.shape))
        part["bytes"] += info.nbytes
    return {
        "folder": str(folder),
        "dtype": config.dtype,
        "weights": _weights(config),
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocabulary": config.vocab_size,
        "context": config.context_limit,
        "image": f"{config.visual.image_size} x {config.visual.image_size} pixels, {config.visual.n_queries} tokens",
        "kv_bytes_per_token": bytes_per_token(config, getattr(torch, config.dtype)),
        "parts": parts,
        "parameters": sum(part["parameters"] for part in parts.values()),
        "bytes": sum(part["bytes"] for part in parts.values()),
    }


def show_info(report: dict[str, Any]) -> None:
    """Print the report as tables."""
    from rich.console import Console
    from rich.table import Table

    device, model = report["device"], report["model"]
    facts = Table.grid("", "", padding=(0, 2))
    versions = [f"{name} {number}" for name, number in report["versions"].items() if number]
    facts.add_row("versions", ", ".join(versions))
    facts.add_row("device", f"{device['name']}, {size(device['memory_bytes'])} of memory")
    facts.add_row("kernels", "; ".join(report["kernels"].values()))
    facts.add_row("model", model["folder"])
    facts.add_row("", f"{model['weights']}, {model['layers']} layers of {model['hidden_size']}")
    facts.add_row(
        "", f"{model['context']:,} tokens of context, {size(model['kv_bytes_per_token'])} of KV cache per token"
    )
    facts.add_row("", f"images: {model['image']}")
    sizes = Table("part", box=None, pad_edge=False)
    for heading in ("parameters", "on disk"):
        sizes.add_column(heading, justify="right")
    for name, part in {**model["parts"], "total": model}.items():
        sizes.add_row(name, f"{part['parameters']:,}", size(part["bytes"]))
    checks = Table("optional", "", "without it", box=None, pad_edge=False)
    for check in report["checks"]:
        checks.add_row(check["part"], "yes" if check["found"] else "missing", "" if check["found"] else check["cost"])
    console = Console(highlight=False, markup=False)
    for table in (facts, sizes, checks):
        console.print(table)
        console.print()


def _checks() -> list[Check]:
    import torch

    from qvl_kernels import report
    from qvl_runtime.prompt.fonts import INSTALL_HINT, pick_font

    def has(module: str) -> bool:
        return find_spec(module) is not None

    compiled = report(torch.device("cpu"))["ops"].startswith("C++")
    return [
        Check(
            "C++ kernels",
            compiled,
            "int4 is unpacked at each use, in plain torch: install g++ and reinstall qvl-runtime",
        ),
        Check(
            "CUDA GPU",
            torch.cuda.is_available(),
            "inference runs on the CPU: fine for a small model, slow for 9.6 billion",
        ),
        Check("triton", has("triton"), "no GPU kernels: pip install 'qvl-runtime[cuda]'"),
        Check("modelscope", has("modelscope"), "no --source modelscope: pip install 'qvl-runtime[modelscope]'"),
        Check("font for Chinese", not pick_font("框狗", 16)[1], f"Chinese labels show as empty boxes: {INSTALL_HINT}"),
        Check("readline", has("readline"), "no arrow keys or history in qvl chat"),
    ]


def _weights(config: ModelConfig) -> str:
    quantization = config.quantization
    if quantization is None:
        return config.dtype
    group = "one group per row" if quantization.group_size == -1 else f"groups of {quantization.group_size}"
    return f"int{quantization.bits} (GPTQ, {group}) in the decoder, {config.dtype} elsewhere"


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
