"""How much memory an engine may take: the size of its KV cache, and whether decode graphs are captured."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from qvl_kernels import cpu, reference
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
    plan = Plan(config, checkpoint_options(folder, name, asked.precision, asked.kv_dtype), device.type)
    tokens = BLOCK_SIZE if asked.kv_cache_bytes is None else asked.kv_cache_bytes // plan.kv_per_token
    workload = Workload(tokens, min(asked.max_step_tokens, config.context_limit), 1)
    check_fits(plan, workload, Device(device_name(device), free, None))
    return free - plan.peak(workload._replace(tokens=0)).total
