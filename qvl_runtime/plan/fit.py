"""Whether a workload fits a device, and which options would make it fit."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from qvl_runtime.errors import CapacityError
from qvl_runtime.plan.gpus import Device
from qvl_runtime.plan.options import Peak, Workload
from qvl_runtime.plan.plan import Plan


class Suggestion(NamedTuple):
    """Options that make a workload fit."""

    options: str  # such as "an int8 KV cache, an int8 head"
    peak: Peak


def check_fits(plan: Plan, workload: Workload, device: Device) -> None:
    """Raise `CapacityError` where a workload does not fit a device, with the numbers and options that would."""
    peak = plan.peak(workload, device)
    if peak.total <= device.memory:
        return
    weights = peak.vision + peak.language + peak.embedding + peak.head
    suggestion = suggest(plan, workload, device)
    way_out = "use the Int4 checkpoint or more memory"
    if suggestion is not None:
        way_out = f"it fits with {suggestion.options} ({_gib(suggestion.peak.total)})"
    raise CapacityError(
        f"{device.name} has {_gib(device.memory)} of memory; the model needs {_gib(peak.total)} "
        f"({_gib(weights)} of weights, {_gib(peak.kv)} of KV cache for {workload.tokens} tokens, "
        f"{_gib(peak.workspace)} of workspace): {way_out}; qvl plan shows more"
    )


def suggest(plan: Plan, workload: Workload, device: Device) -> Suggestion | None:
    """The fewest options that make a workload fit; None where it fits already, or never."""
    if plan.peak(workload, device).total <= device.memory:
        return None
    steps: list[tuple[str, dict[str, str | bool]]] = [
        ("an int8 KV cache", {"kv": "int8"}),
        ("an int8 vision encoder", {"vision": "int8"}),
        ("an int8 head", {"head": "int8"}),
    ]
    if plan.device != "cpu":  # a CPU has the embedding in its memory anyway
        steps.append(("the embedding on the host", {"embedding_on_host": True}))
    options, names = plan.options, []
    for name, change in steps:
        options = replace(options, **change)  # type: ignore[arg-type]
        names.append(name)
        peak = Plan(plan.config, options, plan.device).peak(workload, device)
        if peak.total <= device.memory:
            return Suggestion(", ".join(names), peak)
    return None


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
