"""`qvl merge`: make one checkpoint of a base model and a LoRA adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvl_runtime.cli.options import AsJson, Debug, Download, Hub, Quiet, model_folder
from qvl_runtime.cli.terminal import print_json, progress_bar, say, working

if TYPE_CHECKING:
    from qvl_runtime.finetune.probe import Distance


def merge(
    *,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The base checkpoint: a folder or a hub id.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A LoRA adapter in peft's files.")],
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to create.")],
    again: Annotated[
        bool,
        typer.Option("--requantize", help="For an Int4 base: dequantize, add, and quantize the sum with GPTQ."),
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Conversations to calibrate and compare on: best the training data. Default: built-in."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", help="Conversations to calibrate on.")] = 64,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Compare with the adapter on this checkpoint, which it was trained on. Default: MODEL.",
        ),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Run base with adapter, and the result, and compare them.")
    ] = True,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda or cuda:N.")] = "auto",
    download: Download = False,
    hub: Hub = "huggingface",
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Merge a LoRA adapter into its base: W + scale * B A in float32, rounded once.

    An adapter that was trained on an Int4 checkpoint fits the float one, too, but is off by what quantization changed:
    --against says how much.

    [cyan]qvl merge Qwen/Qwen-VL-Chat my-adapter my-model[/cyan]

    [cyan]qvl merge Qwen/Qwen-VL-Chat-Int4 my-adapter my-int4 --requantize --calibration train.json[/cyan]
    """
    with working("reading the adapter"):
        from qvl_runtime.config.model import ModelConfig
        from qvl_runtime.finetune.merge import merge as merge_adapter
        from qvl_runtime.finetune.probe import answer_logits, distance, probe_samples
        from qvl_runtime.finetune.requantize import requantize
        from qvl_runtime.formats.layout import decoder_linears
        from qvl_runtime.host import choose_device
        from qvl_runtime.weights.adapter import read_adapter

        folder = model_folder(model, download, hub)
        config = ModelConfig.from_folder(folder)
        own = read_adapter(adapter, config)
        place = str(choose_device(device))
    if again:
        with progress_bar("linears", len(decoder_linears(config)), shown=not quiet) as advance:
            result = requantize(folder, adapter, destination, calibration, samples, place, advance)
        _report(
            {"base without the adapter": result.without, "requantized": result.requantized}, destination, as_json, quiet
        )
        return 0
    change = merge_adapter(folder, adapter, destination)
    if not quiet:
        say(
            f"{change.linears} linears changed by up to {change.largest:.3g}, {change.mean:.3g} on average; "
            f"{100 * change.unchanged:.1f} % of their weights rounded to what they were"
            + (f"; {change.replaced} modules replaced" if change.replaced else "")
        )
    distances = {}
    if probe:
        with working("comparing base with adapter and result"):
            trained_on = folder if against is None else model_folder(against, download, hub)
            rows = probe_samples(folder, calibration)
            reference = answer_logits(trained_on, rows, own, place)
            distances["merged"] = distance(reference, answer_logits(destination, rows, None, place))
    _report(distances, destination, as_json, quiet, change._asdict())
    return 0


def _report(
    distances: dict[str, Distance], destination: Path, as_json: bool, quiet: bool, more: dict[str, float] | None = None
) -> None:
    """Print how far models are from the base with its adapter."""
    if as_json:
        print_json({**(more or {}), **{name: each._asdict() for name, each in distances.items()}})
    elif not quiet:
        for name, each in distances.items():
            say(
                f"{name}, from the base with the adapter: KL {each.kl:.2e}, logits off by up to {each.largest:.3g}, "
                f"{100 * each.agreement:.1f} % of tokens the same"
            )
    if not quiet:
        say(f"wrote {destination}")
