"""What `qvl plan` estimates for an engine that is running, so that measurements can be compared with it."""

from __future__ import annotations

from dataclasses import replace

from qvl_runtime.engine.engine import Engine
from qvl_runtime.plan.gpus import Machine
from qvl_runtime.plan.plan import Load, Plan, choices_of


def plan_of(engine: Engine) -> Plan:
    """The plan of the running model, as it was made before loading; synthetic weights are entirely in memory."""
    config, model = engine.engine_config, engine.loop.runner.model
    choices = choices_of(engine.folder, str(model.dtype).removeprefix("torch."), config.precision, config.kv_dtype)
    if config.synthetic is not None:
        choices = replace(choices, mapped=())
    choices = replace(choices, step_tokens=config.max_step_tokens, embedding_on_host=config.embedding_on_host)
    return Plan(engine.config, choices, model.device.type)


def planned_peak(engine: Engine, kv_tokens: int, prompt_tokens: int, images: int, process_bytes: int) -> int:
    """Estimated peak memory in bytes.

    kv_tokens: tokens in the KV cache; prompt_tokens: computed in prefill; process_bytes: held by the process itself.
    """
    machine = Machine("", 0, None, process_bytes)
    return plan_of(engine).peak(Load(kv_tokens, prompt_tokens, images), machine).total


def generated_code_bytes(engine: Engine, prompt_tokens: int, images: int) -> int:
    """Bytes of machine code that oneDNN generates on a CPU for the shapes of this model and prompt."""
    return plan_of(engine).compiled(Load(0, prompt_tokens, images))
