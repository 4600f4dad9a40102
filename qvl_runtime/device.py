"""Which device and dtype a model runs on, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qvl_kernels import report as kernel_report
from qvl_runtime.config import ModelConfig
from qvl_runtime.errors import ConfigError
from qvl_runtime.schedule.runner import Runner


def choose_device(name: str) -> torch.device:
    """Auto is a GPU where torch can use one, else the CPU. Raises `ConfigError` for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        built = (
            f"torch {torch.__version__} sees none" if torch.version.cuda else f"torch {torch.__version__} has no CUDA"
        )
        raise ConfigError(f"device is {name!r}, but there is no usable GPU ({built}): use device='cpu' or 'auto'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device is {name!r}, but there are {torch.cuda.device_count()} GPUs, counted from 0")
    return device


def choose_dtype(name: str, config: ModelConfig) -> torch.dtype:
    """Auto is what the checkpoint says it should run in."""
    dtype: torch.dtype = getattr(torch, config.dtype if name == "auto" else name)
    return dtype


def describe(folder: Path, runner: Runner, load_s: float) -> dict[str, Any]:
    """What runs: the content of `Engine.report()`. Memory in bytes, time in seconds."""
    model, cache, images = runner.model, runner.cache, runner.images
    c = model.config
    looked_up = images.hits + images.misses
    return {
        "model": {
            "folder": str(folder),
            "layers": c.num_hidden_layers,
            "hidden_size": c.hidden_size,
            "vision_layers": c.visual.layers,
            "tokens_per_picture": c.visual.n_queries,
            "quantization": None if c.quantization is None else f"GPTQ {c.quantization.bits} bits",
            "context": c.context_limit,
            "load_s": load_s,
        },
        "device": device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "precision": model.precision,
        "kernels": kernel_report(model.device) | model.kernels,
        "memory": {
            **model.bytes_by_part,
            "weights": sum(model.bytes_by_part.values()),
            "kv_per_token": cache.bytes_per_token,
            "kv_reserved": cache.bytes_per_token * cache.num_slots,
            "picture_features": images.bytes,
        },
        "caches": {
            "kv": {
                "dtype": str(cache.layers[0].k.dtype).removeprefix("torch."),
                "slots": cache.num_slots,
                "free": cache.free_tokens,
            },
            "pictures": {"held": len(images), "lookups": looked_up, "hit_rate": images.hits / max(1, looked_up)},
        },
    }


def device_name(device: torch.device) -> str:
    """Such as "cuda:0 (NVIDIA A100-SXM4-80GB)", or "cpu (AMD EPYC 9R14, 2 threads)"."""
    if device.type == "cuda":
        return f"cuda:{device.index or 0} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"cpu ({_cpu_model()}, {threads} thread{'s' if threads > 1 else ''})"


def _cpu_model() -> str:
    import platform

    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
