"""The commands of `qvl` that make, check and measure checkpoints: convert, verify, quantize, plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qvl_runtime.cli.options import AsJson, Debug, Quiet


def convert(
    *,
    source: Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint folder, or a hub id that is here.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The new folder.")],
    to: Annotated[
        str, typer.Option("--target", "--to", metavar="NAME", help="cpu or cuda; hf: back to what was published.")
    ] = "cpu",
    dtype: Annotated[str, typer.Option(metavar="NAME", help="Of what stays float: auto, float16, …")] = "auto",
    vision: Annotated[str, typer.Option(metavar="NAME", help="keep, or int8: half the tower's size.")] = "keep",
    head: Annotated[str, typer.Option(metavar="NAME", help="keep, int8 or int4.")] = "keep",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Lay a checkpoint out for the kernels of a CPU or GPU, once, so that every later start takes a second.

    Stopped at any moment, the same command goes on where it was. With --to hf, the published files come back.

    [cyan]qvl convert Qwen/Qwen-VL-Chat-Int4 ./chat-int4-cpu[/cyan]

    [cyan]qvl convert ./my-finetune ./my-finetune-cpu --vision int8 --head int8[/cyan]

    [cyan]qvl convert ./chat-int4-cpu ./chat-int4-again --to hf[/cyan]
    """
    from qvl_runtime.cli.weights_commands import run_convert, run_restore, target_of
    from qvl_runtime.weights.hub import resolve_model

    options = target_of(to, {"dtype": dtype, "vision": vision, "head": head})
    folder = resolve_model(source)
    if options is None:
        return run_restore(folder, destination, quiet)
    return run_convert(folder, destination, options, dry_run, quiet)


def verify(
    *,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What `qvl convert` made.")],
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Say whether a converted checkpoint is still what was written, and if not, which tensor of it."""
    from qvl_runtime.cli.weights_commands import run_verify

    return run_verify(folder, quiet)


def quantize(
    *,
    source: Annotated[str, typer.Argument(metavar="SRC", help="A float checkpoint: a folder or a hub id.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The folder to make.")],
    method: Annotated[str, typer.Option(metavar="NAME", help="gptq, or rtn: round to nearest.")] = "gptq",
    bits: Annotated[int, typer.Option(metavar="N", help="4 or 8.")] = 4,
    group: Annotated[int, typer.Option(metavar="N", help="Inputs that share a scale: 32, 64, 128 or -1, all.")] = 128,
    asym: Annotated[bool, typer.Option("--asym", help="Zero points where zero falls, not in the middle.")] = False,
    act_order: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Which inputs are rounded first: static: those that matter most; full: they form the groups, too "
            "(desc_act, slower to run); none: as they come.",
        ),
    ] = "static",
    damping: Annotated[float, typer.Option(metavar="X", help="Added to the statistics' diagonal, of its mean.")] = 0.01,
    drift: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="How much of what rounding earlier layers did to its inputs a linear makes up for; 0: plain GPTQ.",
        ),
    ] = 0.5,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Conversations in Qwen-VL's fine-tuning JSON; without: a built-in set."),
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", help="Conversations to use; an eighth is held out.")] = 64,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Cut conversations to so many.")] = 512,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda or cuda:N.")] = "auto",
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the errors (needs matplotlib).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what it takes, and stop.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Quantize a float checkpoint with GPTQ, into the layout of Qwen-VL-Chat-Int4; vision stays as it is.

    Memory holds one layer at a time. Stopped, even by kill -9, the same command goes on after the last whole layer.

    [cyan]qvl quantize my-finetune my-finetune-int4 --calibration train.json[/cyan]

    [cyan]qvl quantize Qwen/Qwen-VL-Chat chat-int4 --group 64 --plot errors.png[/cyan]
    """
    from qvl_runtime.cli.quantize import QuantizeRequest, quantize_checkpoint

    asked = QuantizeRequest(
        source,
        destination,
        calibration,
        device,
        plot,
        dry_run,
        as_json,
        quiet,
        {
            "method": method,
            "bits": bits,
            "group_size": group,
            "sym": not asym,
            "order": act_order,
            "damping": damping,
            "drift": drift,
            "samples": samples,
            "max_tokens": max_tokens,
        },
    )
    return quantize_checkpoint(asked)


def plan(
    *,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder, or a hub id that is here.")],
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="A GPU, such as a100-40; else this machine.")] = None,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="auto, float32, bfloat16 or float16.")] = "auto",
    vision: Annotated[str, typer.Option(metavar="NAME", help="keep, or int8.")] = "keep",
    head: Annotated[str, typer.Option(metavar="NAME", help="keep, int8 or int4.")] = "keep",
    kv: Annotated[str, typer.Option(metavar="NAME", help="auto, or int8.")] = "auto",
    embedding_on_host: Annotated[
        bool, typer.Option("--embedding-on-host", help="Leave the embedding table in the host's mapped file.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Say what a model needs and what fits, before anything of it is loaded.

    [cyan]qvl plan Qwen/Qwen-VL-Chat-Int4[/cyan]

    [cyan]qvl plan Qwen/Qwen-VL-Chat --gpu 3090 --kv int8[/cyan]
    """
    from qvl_runtime.cli.plan import plan_of, show, show_json
    from qvl_runtime.plan.plan import Choices
    from qvl_runtime.weights.hub import resolve_model

    found = plan_of(resolve_model(model), gpu, Choices(dtype, vision, head, kv, embedding_on_host))
    (show_json if as_json else show)(found)
    return 0
