"""`qvl plan`: estimate the memory a checkpoint needs, and its best speed, on this machine or a named GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from qvl_runtime.cli.options import AsJson, Debug, Download, Hub, model_folder
from qvl_runtime.cli.terminal import print_json, print_table, size

if TYPE_CHECKING:
    from rich.table import Table

    from qvl_runtime.plan.gpus import Device
    from qvl_runtime.plan.options import PlanOptions, Workload
    from qvl_runtime.plan.plan import Plan

TRAINING_LENGTHS = (384, 512, 1024, 2048)  # tokens of a micro-batch, as in the published table
CONTEXTS = (300, 2048, 8192)  # tokens at which the speed is bounded


def plan(
    *,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder, or a hub id.")],
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="Plan for a GPU such as a100-40. Default: this machine's CPU.")
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="auto, float32, bfloat16 or float16.")] = "auto",
    vision: Annotated[str, typer.Option(metavar="NAME", help="The vision encoder: keep, or int8.")] = "keep",
    head: Annotated[str, typer.Option(metavar="NAME", help="The output head: keep, int8 or int4.")] = "keep",
    kv: Annotated[str, typer.Option(metavar="NAME", help="The KV cache: auto, or int8.")] = "auto",
    embedding_on_host: Annotated[
        bool, typer.Option("--embedding-on-host", help="Keep the embedding table in host memory, not on the GPU.")
    ] = False,
    finetune: Annotated[
        str | None,
        typer.Option(metavar="METHOD", help="Plan for training instead: the peak of a step of lora, qlora or full."),
    ] = None,
    download: Download = False,
    hub: Hub = "huggingface",
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Estimate what a model needs and what fits, without loading it.

    [cyan]qvl plan Qwen/Qwen-VL-Chat-Int4[/cyan]

    [cyan]qvl plan Qwen/Qwen-VL-Chat --gpu 3090 --kv int8[/cyan]

    [cyan]qvl plan Qwen/Qwen-VL-Chat --finetune lora[/cyan]
    """
    if finetune is not None:
        return plan_training(model_folder(model, download, hub), finetune, dtype, as_json)
    from qvl_runtime.plan.options import PlanOptions

    report = plan_report(
        model_folder(model, download, hub), gpu, PlanOptions(dtype, vision, head, kv, embedding_on_host)
    )
    if as_json:
        print_json(report, indent=2)
    else:
        show_plan(report)
    return 0


def plan_training(folder: Path, method: str, dtype: str, as_json: bool) -> int:
    """Print the peak memory of a training step at the lengths of the published table, with that method's defaults."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from qvl_runtime.config.model import ModelConfig
    from qvl_runtime.finetune.memory import training_memory
    from qvl_runtime.finetune.options import FinetuneOptions
    from qvl_runtime.finetune.run import with_defaults_of

    config = ModelConfig.from_folder(folder)
    options = with_defaults_of(FinetuneOptions(method=cast("Any", method), dtype=dtype), folder)
    lengths = [length for length in TRAINING_LENGTHS if length <= config.seq_length and length > config.visual.span]
    rows = {length: training_memory(config, options, length) for length in lengths}
    if as_json:
        print_json({str(length): {**row._asdict(), "total": row.total} for length, row in rows.items()}, indent=2)
        return 0
    table = Table("tokens", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("weights", "optimizer", "step", "total", "in GB"):
        table.add_column(name, justify="right")
    for length, row in rows.items():
        table.add_row(str(length), *(size(part) for part in (*row, row.total)), f"{row.total / 1e9:.1f}")
    print_table(table)
    print("computed: the peak of micro-batches of that length with one image, without what the allocator keeps")
    return 0


def plan_report(folder: Path, gpu_name: str | None, options: PlanOptions, measure: bool = True) -> dict[str, Any]:
    """The plan of a checkpoint folder as plain values: bytes, and tokens per second.

    gpu_name: None plans for this machine's CPU; `measure` then includes its memory bandwidth.
    """
    from qvl_runtime.plan.gpus import gpu
    from qvl_runtime.plan.options import Workload, checkpoint_options
    from qvl_runtime.plan.plan import Plan
    from qvl_runtime.weights.loader import model_config
    from qvl_runtime.weights.manifest import is_converted

    config = model_config(folder)
    if is_converted(folder):  # its precisions are fixed
        converted = checkpoint_options(folder, options.dtype)
        options = replace(options, vision=converted.vision, head=converted.head)
    plan = Plan(config, options, "cpu" if gpu_name is None else "cuda")
    device = this_machine(folder, options.dtype, measure) if gpu_name is None else gpu(gpu_name)
    context = config.context_limit
    workloads = {
        "encode 2048": Workload(2049, 2048),
        "generate 8192": Workload(8193, 1),
        "all, 8 images": Workload(context, context, 8),
    }
    capacity = plan.capacity(device)
    return {
        "model": str(folder),
        "machine": device._asdict(),
        "dtype": plan.dtype,
        "weights": plan.weights,
        "weights_total": sum(plan.weights.values()),
        "kv_per_token": plan.kv_per_token,
        "kv_per_image": plan.kv_per_image,
        "features_per_image": plan.feature_bytes,
        "fits": {"tokens": capacity.tokens, "images": capacity.images},
        "peaks": {name: _peak(plan, workload, device) for name, workload in workloads.items()},
        "speed_bounds": {str(n): plan.bound_tokens_per_s(device, n) for n in CONTEXTS},
    }


def show_plan(plan: dict[str, Any]) -> None:
    """Print a plan as labeled lines around a table; lines wrap only if standard output is a terminal."""
    machine, fits = plan["machine"], plan["fits"]
    parts = ", ".join(f"{name} {size(count)}" for name, count in plan["weights"].items() if count)
    _print_facts(
        {
            "weights": f"{size(plan['weights_total'])} in {plan['dtype']}: {parts}",
            "KV cache": f"{size(plan['kv_per_token'])} per token; an image needs {size(plan['kv_per_image'])} of it, "
            f"and {size(plan['features_per_image'])} for its features",
            "fits": f"{machine['name']} ({size(machine['memory'])}): {fits['tokens']:,} tokens, or "
            f"{fits['images']:,} images with their tokens",
        }
    )
    print_table(peak_table(plan["peaks"]))
    bounds = [(n, rate) for n, rate in plan["speed_bounds"].items() if rate is not None]
    if bounds:
        (first, best), *others = bounds
        rates = ", ".join([f"{best:,.1f} tok/s at {first} tokens", *(f"{rate:,.1f} at {n}" for n, rate in others)])
        _print_facts({"speed": f"at most {rates} (bandwidth / bytes per token: a bound, not a forecast)"})


def _print_facts(facts: dict[str, str]) -> None:
    from rich.table import Table

    table = Table.grid("label", "text", padding=(0, 1, 0, 0))
    for label, text in facts.items():
        table.add_row(f"{label:9}", text)
    print_table(table)


def peak_table(peaks: dict[str, dict[str, Any]]) -> Table:
    """The peak memory of each workload by part, and whether it fits."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table("peak", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("weights", "KV", "features", "work", "rest", "total"):
        table.add_column(name, justify="right")
    table.add_column("")
    for name, peak in peaks.items():
        weights = sum(peak[part] for part in ("vision", "language", "embedding", "head"))
        cells = [size(n) for n in (weights, *(peak[p] for p in ("kv", "features", "workspace", "reserved", "total")))]
        table.add_row(name, *cells, "fits" if peak["fits"] else f"too large; try {peak['suggestion']}")
    return table


def this_machine(folder: Path, dtype: str, measure: bool = True) -> Device:
    """This computer: its available memory, its memory bandwidth (if `measure`), and what the process itself needs."""
    import torch

    from qvl_runtime.host import device_name, free_memory
    from qvl_runtime.plan.gpus import Device
    from qvl_runtime.profile.process import process_bytes, read_bandwidth

    cpu, base = torch.device("cpu"), process_bytes(folder, dtype)
    return Device(device_name(cpu), free_memory(cpu) + base, read_bandwidth() if measure else None, base)


def _peak(plan: Plan, workload: Workload, device: Device) -> dict[str, Any]:
    from qvl_runtime.plan.fit import suggest

    peak, suggestion = plan.peak(workload, device), suggest(plan, workload, device)
    fits = peak.total <= device.memory
    change = None if fits else "a larger machine" if suggestion is None else suggestion.options
    return {**peak._asdict(), "total": peak.total, "fits": fits, "suggestion": change}
