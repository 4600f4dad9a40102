"""The content of `Engine.report()`: model, device, kernels, memory and caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qvl_kernels import report as kernel_report
from qvl_kernels.util import dtype_name
from qvl_runtime.config.generation import GenerationDefaults
from qvl_runtime.cores import usable_cores
from qvl_runtime.host import device_name
from qvl_runtime.schedule.api import SamplingParams
from qvl_runtime.schedule.core import EngineCore
from qvl_runtime.schedule.kv_cache import KVCache


def describe(folder: Path, core: EngineCore, load_s: float) -> dict[str, Any]:
    """Return the content of `Engine.report()`. Memory in bytes, time in seconds."""
    model, cache, images = core.runner.model, core.runner.cache, core.runner.images
    c = model.config
    lookups = images.hits + images.misses
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
            "notes": list(core.runner.notes),
            "adapters": [] if model.adapters is None else list(model.adapters.names),
        },
        "device": device_name(model.device),
        "dtype": dtype_name(model.dtype),
        "threads": torch.get_num_threads(),
        "cores": usable_cores()._asdict() if model.device.type == "cpu" else None,
        "precision": model.precision,
        "kernels": kernel_report(model.device) | model.kernels,
        "memory": {
            **model.bytes_by_part,
            "weights": sum(model.bytes_by_part.values()),
            "adapters": 0 if model.adapters is None else model.adapters.nbytes,
            "kv_per_token": cache.bytes_per_token,
            "kv_reserved": cache.bytes_per_token * cache.num_slots,
            "image_features": images.bytes,
        },
        "caches": {
            "kv": {
                "dtype": dtype_name(cache.layers[0].k.dtype),
                "slots": cache.num_slots,
                "free": cache.free_tokens,
                "kept": cache.pool.evictable,
                "evictions": cache.pool.evictions,
            },
            "prefixes": describe_prefixes(cache),
            "images": {"held": len(images), "lookups": lookups, "hit_rate": images.hits / max(1, lookups)},
        },
        "requests": {
            "running": len(core.scheduler.running),
            "waiting": len(core.scheduler.waiting),
            "steps": core.steps,
            "preemptions": core.scheduler.preemptions,
            "steps_ahead": 0 if core.overlap is None else core.overlap.steps,
            "rows_over_run": 0 if core.overlap is None else core.overlap.lost_rows,
        },
        "graphs": core.runner.graphs and core.runner.graphs.report(),
        "prefill_graphs": core.runner.prefill_graphs and core.runner.prefill_graphs.report(),
        "drafts": core.drafter and {"proposed": core.drafter.proposed, "accepted": core.drafter.accepted},
    }


def describe_prefixes(cache: KVCache) -> dict[str, Any] | None:
    """Return how many prompt tokens were found in the prefix cache; None without prefix caching."""
    prefixes = cache.prefixes
    if prefixes is None:
        return None
    queried, hit = prefixes.queried_tokens, prefixes.hit_tokens
    return {
        "blocks": len(prefixes.blocks),
        "asked_tokens": queried,
        "hit_tokens": hit,
        "hit_rate": hit / max(1, queried),
    }


def note_of_defaults(
    requested: SamplingParams, defaults: GenerationDefaults, usual_stop_ids: frozenset[int]
) -> str | None:
    """Describe the parameters that generation_config.json sets for a request; None if it is plain greedy."""
    resolved = requested.resolve(defaults)
    plain = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "max_tokens": None}
    plain["timeout_s"] = None
    unused = () if resolved.temperature else ("top_p", "top_k")  # unused by greedy decoding
    parts = [
        f"{name} {getattr(resolved, name):g}"
        for name, value in plain.items()
        if name not in unused and getattr(requested, name) is None and getattr(resolved, name) != value
    ]
    parts += defaults.rules(usual_stop_ids, ends=not (requested.ignore_eos or requested.end_of_text_only))
    return f"from generation_config.json: {', '.join(parts)}" if parts else None
