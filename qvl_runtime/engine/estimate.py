"""The estimates of `qvl plan` for a running engine, to be compared with measurements."""

from __future__ import annotations

from dataclasses import replace

from qvl_kernels.util import dtype_name
from qvl_runtime.engine.engine import Engine
from qvl_runtime.plan.gpus import Device
from qvl_runtime.plan.options import Workload, checkpoint_options
from qvl_runtime.plan.plan import Plan


def plan_of(engine: Engine) -> Plan:
    """Return the plan of the running model, as it was made before loading; synthetic weights are all in memory."""
    config, model = engine.engine_config, engine.core.runner.model
    dtype = dtype_name(model.dtype)
    options = checkpoint_options(engine.folder, dtype, config.precision, config.kv_dtype)
    if config.synthetic is not None:
        options = replace(options, mapped=())
    on_host, step_tokens = config.embedding_on_host, config.max_step_tokens
    options = replace(options, max_step_tokens=step_tokens, embedding_on_host=on_host)
    return Plan(engine.config, options, model.device.type)


def planned_peak(engine: Engine, kv_tokens: int, prompt_tokens: int, images: int, process_bytes: int) -> int:
    """Return the estimated peak memory in bytes.

    kv_tokens: tokens in the KV cache; prompt_tokens: computed in prefill; process_bytes: of the process itself.
    """
    device = Device("", 0, None, process_bytes)
    return plan_of(engine).peak(Workload(kv_tokens, prompt_tokens, images), device).total


def generated_code_bytes(engine: Engine, prompt_tokens: int, images: int) -> int:
    """Return the bytes of machine code that oneDNN generates on a CPU for the shapes of this model and prompt."""
    return plan_of(engine).compiled_bytes(Workload(0, prompt_tokens, images))
