"""How much memory an engine may use: the size of its KV cache, and whether decode graphs are captured."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from qvl_kernels import cpu, reference
from qvl_kernels.util import dtype_name
from qvl_runtime.config.engine import EngineConfig
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.engine.warm_up import MARGIN, workspace_bytes
from qvl_runtime.errors import ConfigError
from qvl_runtime.host import device_name, free_memory
from qvl_runtime.model.cache_layout import BLOCK_SIZE
from qvl_runtime.model.qwen_vl import QwenVL
from qvl_runtime.plan.fit import check_fits
from qvl_runtime.plan.gpus import Device
from qvl_runtime.plan.options import Workload, checkpoint_options
from qvl_runtime.plan.plan import Plan
from qvl_runtime.schedule import cpu_graphs
from qvl_runtime.schedule.cpu_graphs import CpuCapture
from qvl_runtime.schedule.cuda_graphs import CudaCapture, CudaMeter
from qvl_runtime.schedule.runner import Runner
from qvl_runtime.schedule.scheduler import StepLimits

_log = logging.getLogger(__name__)


def kv_cache_tokens(config: EngineConfig, per_token: int, context: int, free: int, spare: int | None = None) -> int:
    """Return how many tokens the KV cache holds at `per_token` bytes each.

    They fill `kv_cache_bytes` if it is set; otherwise the `spare` bytes of a GPU; on a CPU half of the `free` bytes, up
    to four contexts. Raises `ConfigError` if not even a block fits; warns if fewer than `context` tokens fit.
    """
    if config.kv_cache_bytes is not None:
        tokens, budget = config.kv_cache_bytes // per_token, config.kv_cache_bytes
    elif spare is not None:
        tokens, budget = spare // per_token, spare
    else:
        budget = max(0, free) // 2
        tokens = min(4 * context, budget // per_token)
    if tokens < BLOCK_SIZE:
        raise ConfigError(
            f"{budget:,} bytes of KV cache hold {tokens} tokens at {per_token:,} bytes each; a block needs "
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


def spare_bytes(model: QwenVL, config: EngineConfig, kv_dtype: torch.dtype) -> int | None:
    """Return the bytes of a GPU that the KV cache may use, measured by a warm-up; None on a CPU."""
    if model.device.type != "cuda" or config.kv_cache_bytes is not None:
        return None
    meter = CudaMeter(model.device)
    workspace = workspace_bytes(model, kv_dtype, StepLimits(config.max_step_tokens, config.max_running), meter)
    free = meter.free()
    spare = free - workspace - config.image_cache_bytes - MARGIN
    if spare <= 0:
        raise ConfigError(
            f"{device_name(model.device)} has {free / 2**20:,.0f} MiB left after loading the weights; a step needs "
            f"{workspace / 2**20:,.0f}, images {config.image_cache_bytes / 2**20:,.0f} and the rest {MARGIN >> 20}: "
            "lower max_step_tokens or image_cache_bytes, or use the Int4 checkpoint"
        )
    return spare


def capture_graphs(runner: Runner, config: EngineConfig, context: int) -> None:
    """Replay decode steps as graphs, and on a GPU short prompts, unless the config or the ops rule it out."""
    model, max_seq_len = runner.model, min(context, runner.cache.num_slots)
    if not config.graphs or model.ops is reference:
        return
    if model.device.type == "cuda":
        capture = CudaCapture(model.device)  # one, whose graphs share their memory
        runner.capture(capture, config.max_running, max_seq_len)
        if not config.batch_invariant:  # their attention is that of prompts
            runner.capture_prefill(capture, config.max_step_tokens, max_seq_len)
    elif model.ops is cpu:
        runner.capture(CpuCapture(), config.max_running, max_seq_len, cpu_graphs.BUCKETS)


def memory_after_loading(
    config: EngineConfig, model_config: ModelConfig, dtype: torch.dtype, folder: Path, device: torch.device
) -> int:
    """Estimate from the plan how many bytes stay free on the device once the model is loaded.

    Raises `CapacityError` if not even the workspace of a step and the requested KV cache fit.
    """
    name, free = dtype_name(dtype), free_memory(device)
    plan = Plan(model_config, checkpoint_options(folder, name, config.precision, config.kv_dtype), device.type)
    tokens = BLOCK_SIZE if config.kv_cache_bytes is None else config.kv_cache_bytes // plan.kv_per_token
    workload = Workload(tokens, min(config.max_step_tokens, model_config.context_limit), 1)
    check_fits(plan, workload, Device(device_name(device), free, None))
    return free - plan.peak(workload._replace(tokens=0)).total
