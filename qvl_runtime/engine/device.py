"""Which device and dtype a model runs on, and what is said of it."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch

from qvl_kernels import cpu, reference
from qvl_kernels import report as kernel_report
from qvl_runtime.config.engine import EngineConfig
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.engine.warm_up import MARGIN, workspace_bytes
from qvl_runtime.errors import ConfigError
from qvl_runtime.model.cache_layout import BLOCK_SIZE
from qvl_runtime.model.qwen_vl import QwenVL
from qvl_runtime.plan.gpus import Machine
from qvl_runtime.plan.plan import Load, Plan, choices_of, refuse
from qvl_runtime.schedule import cpu_graphs
from qvl_runtime.schedule.core import Loop
from qvl_runtime.schedule.cpu_graphs import CpuCapture
from qvl_runtime.schedule.cuda_graphs import CudaCapture, CudaMeter
from qvl_runtime.schedule.kv_cache import KVCache
from qvl_runtime.schedule.runner import Runner
from qvl_runtime.schedule.scheduler import StepLimits

_log = logging.getLogger(__name__)


def choose_device(name: str) -> torch.device:
    """Auto is a GPU where torch can use one, else the CPU. Raises `ConfigError` for a device that is not there."""
    EngineConfig(device=name)  # refuses what is no device's name
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
    try:
        kernel_report(device)
    except (ValueError, RuntimeError) as fault:  # what QVL_KERNELS or QVL_CPU_ISA ask for is not there
        raise ConfigError(str(fault)) from fault
    return device


def choose_dtype(name: str, config: ModelConfig) -> torch.dtype:
    """Auto is what the checkpoint says it should run in."""
    dtype: torch.dtype = getattr(torch, config.dtype if name == "auto" else name)
    return dtype


def describe(folder: Path, loop: Loop, load_s: float) -> dict[str, Any]:
    """What runs: the content of `Engine.report()`. Memory in bytes, time in seconds."""
    model, cache, images = loop.runner.model, loop.runner.cache, loop.runner.images
    c = model.config
    looked_up = images.hits + images.misses
    return {
        "model": {
            "folder": str(folder),
            "layers": c.num_hidden_layers,
            "hidden_size": c.hidden_size,
            "vision_layers": c.visual.layers,
            "tokens_per_image": c.visual.n_queries,
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
            "image_features": images.bytes,
        },
        "caches": {
            "kv": {
                "dtype": str(cache.layers[0].k.dtype).removeprefix("torch."),
                "slots": cache.num_slots,
                "free": cache.free_tokens,
                "kept": cache.pool.kept,
                "evictions": cache.pool.evictions,
            },
            "prefixes": describe_prefixes(cache),
            "images": {"held": len(images), "lookups": looked_up, "hit_rate": images.hits / max(1, looked_up)},
        },
        "requests": {
            "running": len(loop.scheduler.running),
            "waiting": len(loop.scheduler.waiting),
            "steps": loop.steps,
            "preemptions": loop.scheduler.preemptions,
        },
        "graphs": loop.runner.graphs and loop.runner.graphs.report(),
        "drafts": loop.drafter and {"proposed": loop.drafter.proposed, "accepted": loop.drafter.accepted},
    }


def describe_prefixes(cache: KVCache) -> dict[str, Any] | None:
    """How much of the prompts was found in the KV cache; None where it is not looked for."""
    known = cache.prefixes
    if known is None:
        return None
    asked, hit = known.asked_tokens, known.hit_tokens
    return {"blocks": len(known.blocks), "asked_tokens": asked, "hit_tokens": hit, "hit_rate": hit / max(1, asked)}


def kv_cache_tokens(asked: EngineConfig, per_token: int, context: int, free: int, spare: int | None = None) -> int:
    """How many tokens the KV cache is to hold at `per_token` bytes each.

    That of the budget asked for; all of the `spare` bytes that a GPU has left; or on a CPU, which others use too,
    half of the `free` bytes. Raises `ConfigError` for a budget below a block; warns where no request reaches `context`
    tokens.
    """
    if asked.kv_cache_bytes is not None:
        tokens, budget = asked.kv_cache_bytes // per_token, asked.kv_cache_bytes
    elif spare is not None:
        tokens, budget = spare // per_token, spare
    else:
        budget = max(0, free) // 2
        tokens = min(4 * context, budget // per_token)
    if tokens < BLOCK_SIZE:
        raise ConfigError(
            f"{budget:,} bytes of KV cache hold {tokens} tokens at {per_token:,} bytes each; a block takes "
            f"{BLOCK_SIZE}: raise kv_cache_bytes, or use kv_dtype='int8'"
        )
    if tokens < context:
        _log.warning(
            "the KV cache holds %d tokens (%.0f MiB), fewer than the context's %d: raise kv_cache_bytes, or use "
            "kv_dtype='int8'",
            tokens,
            tokens * per_token / 2**20,
            context,
        )
    return tokens


def spare_bytes(model: QwenVL, asked: EngineConfig, kept: torch.dtype) -> int | None:
    """Bytes of a GPU that nothing but the KV cache will need, found by a warm-up; None on a CPU."""
    if model.device.type != "cuda" or asked.kv_cache_bytes is not None:
        return None
    meter = CudaMeter(model.device)
    workspace = workspace_bytes(model, kept, StepLimits(asked.max_step_tokens, asked.max_running), meter)
    free = meter.free()
    spare = free - workspace - asked.image_cache_bytes - MARGIN
    if spare <= 0:
        raise ConfigError(
            f"{device_name(model.device)} has {free / 2**20:,.0f} MiB left beside the weights; a step needs "
            f"{workspace / 2**20:,.0f}, images {asked.image_cache_bytes / 2**20:,.0f} and the rest {MARGIN >> 20}: "
            "lower max_step_tokens or image_cache_bytes, or use the Int4 checkpoint"
        )
    return spare


def capture_graphs(runner: Runner, asked: EngineConfig, context: int) -> None:
    """Have decode steps replayed as graphs, where the ops can be captured and it is not refused."""
    model, longest = runner.model, min(context, runner.cache.num_slots)
    if not asked.graphs or model.ops is reference:
        return
    if model.device.type == "cuda":
        runner.capture(CudaCapture(model.device), asked.max_running, longest)
    elif model.ops is cpu:
        runner.capture(CpuCapture(), asked.max_running, longest, cpu_graphs.BUCKETS)


def room_beside(
    asked: EngineConfig, config: ModelConfig, dtype: torch.dtype, folder: Path, device: torch.device
) -> int:
    """Bytes that are free beside a model that is not loaded yet, by its plan.

    Raises `CapacityError` where not even a step's workspace and the cache that was asked for fit.
    """
    name, free = str(dtype).removeprefix("torch."), free_memory(device)
    plan = Plan(config, choices_of(folder, name, asked.precision, asked.kv_dtype), device.type)
    tokens = BLOCK_SIZE if asked.kv_cache_bytes is None else asked.kv_cache_bytes // plan.kv_per_token
    load = Load(tokens, min(asked.max_step_tokens, config.context_limit), 1)
    refuse(plan, load, Machine(device_name(device), free, None))
    return free - plan.peak(load._replace(tokens=0)).total


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on the device; on a CPU what the system calls available, page cache included."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 4 * 2**30  # where nobody tells, a guess that a small machine survives


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
