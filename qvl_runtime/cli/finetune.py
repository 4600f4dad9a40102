"""`qvl finetune`: train a checkpoint, or an adapter for it, on conversations."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from qvl_runtime.cli.options import AsJson, Debug, Download, Hub, Quiet, model_folder
from qvl_runtime.cli.terminal import print_json, progress_bar, say, say_warning, working

if TYPE_CHECKING:
    from qvl_runtime.finetune.labels import LabelKind
    from qvl_runtime.finetune.options import FinetuneOptions, Method
    from qvl_runtime.finetune.run import Finetuning
    from qvl_runtime.finetune.trainer import Trainer

TRAINING, LORA, RUN = "Training", "LoRA", "Run"  # help panels
SCORES = ("loss", "held_out_loss", "exact", "box_iou")  # of the last line, in this order
MAX_LISTED = 100  # faults of the data that are printed


@dataclass(frozen=True)
class TrainingOptions:
    """How to train: the defaults are those of the published scripts."""

    method: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="lora, qlora (LoRA on an Int4 checkpoint), or full.", rich_help_panel=TRAINING
        ),
    ] = "lora"
    labels: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="original: answers and the frame of every turn, as published; answers: these alone.",
            rich_help_panel=TRAINING,
        ),
    ] = "original"
    epochs: Annotated[int, typer.Option(metavar="N", rich_help_panel=TRAINING)] = 5
    batch: Annotated[
        int, typer.Option(metavar="N", help="Samples of a micro-batch, with --no-pack.", rich_help_panel=TRAINING)
    ] = 1
    accumulate: Annotated[
        int, typer.Option(metavar="N", help="Micro-batches of a step, in all processes.", rich_help_panel=TRAINING)
    ] = 8
    max_length: Annotated[
        int,
        typer.Option(metavar="N", help="Longest sample in tokens; longer ones are left out.", rich_help_panel=TRAINING),
    ] = 2048
    pack: Annotated[
        bool,
        typer.Option(
            "--pack/--no-pack", help="Fill micro-batches with samples up to --max-length.", rich_help_panel=TRAINING
        ),
    ] = True
    rate: Annotated[float, typer.Option(metavar="X", help="Peak learning rate.", rich_help_panel=TRAINING)] = 1e-5
    weight_decay: Annotated[float, typer.Option(metavar="X", rich_help_panel=TRAINING)] = 0.1
    warmup: Annotated[
        float, typer.Option(metavar="X", help="Warm-up, as a fraction of the steps.", rich_help_panel=TRAINING)
    ] = 0.01
    mean: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Mean of the losses of a step: token, or batch (of the micro-batches' means, as in the original).",
            rich_help_panel=TRAINING,
        ),
    ] = "token"
    dtype: Annotated[str, typer.Option(metavar="NAME", help="auto, bfloat16 or float32.", rich_help_panel=TRAINING)] = (
        "auto"
    )
    masters: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The optimizer's weights: float32, or bfloat16 (8 instead of 18 bytes a weight, rounded at random).",
            rich_help_panel=TRAINING,
        ),
    ] = None
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--checkpointing/--no-checkpointing",
            help="Recompute activations in the backward pass to save memory.",
            rich_help_panel=TRAINING,
        ),
    ] = True
    train: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="What full trains: some of decoder,embedding,head,resampler,vit.",
            rich_help_panel=TRAINING,
        ),
    ] = "decoder,embedding,head,resampler"
    seed: Annotated[int, typer.Option(metavar="N", rich_help_panel=TRAINING)] = 0
    rank: Annotated[int, typer.Option(metavar="N", rich_help_panel=LORA)] = 64
    alpha: Annotated[float, typer.Option(metavar="X", help="Scale times rank.", rich_help_panel=LORA)] = 16
    dropout: Annotated[float, typer.Option(metavar="X", rich_help_panel=LORA)] = 0.05
    targets: Annotated[
        str,
        typer.Option(metavar="LIST", help="Linears with a side path, by the end of their name.", rich_help_panel=LORA),
    ] = "c_attn,attn.c_proj,w1,w2"
    modules_to_save: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Trained whole: some of wte,lm_head. Default: both for LoRA on a base checkpoint, none else.",
            rich_help_panel=LORA,
        ),
    ] = None
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank).", rich_help_panel=LORA)] = False
    save_every: Annotated[int, typer.Option(metavar="N", help="Steps between saved states.", rich_help_panel=RUN)] = (
        1000
    )
    evaluate_every: Annotated[
        int, typer.Option(metavar="N", help="Steps between evaluations; 0: at the end alone.", rich_help_panel=RUN)
    ] = 0
    evaluate_samples: Annotated[
        int, typer.Option(metavar="N", help="Held-out samples that are answered each time.", rich_help_panel=RUN)
    ] = 16
    sharding: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="With torchrun: data (each process has the model), or fsdp.", rich_help_panel=RUN
        ),
    ] = "none"

    def resolve(self, folder: Path) -> FinetuneOptions:
        """The library's options for a checkpoint. Raises `ConfigError` for a value out of range."""
        from qvl_runtime.finetune.options import FinetuneOptions
        from qvl_runtime.finetune.run import with_defaults_of
        from qvl_runtime.formats.adapter import AdapterConfig

        saved = None if self.modules_to_save is None else names_of(self.modules_to_save)
        lora = AdapterConfig(self.rank, self.alpha, self.dropout, names_of(self.targets), saved or (), self.rslora)
        options = FinetuneOptions(
            method=cast("Method", self.method),
            labels=cast("LabelKind", self.labels),
            epochs=self.epochs,
            batch=self.batch,
            accumulate=self.accumulate,
            max_length=self.max_length,
            pack=self.pack,
            rate=self.rate,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
            mean=cast("Any", self.mean),
            dtype=self.dtype,
            masters=self.masters or "float32",
            checkpointing=self.checkpointing,
            parts=names_of(self.train),
            lora=lora,
            seed=self.seed,
            save_every=self.save_every,
            evaluate_every=self.evaluate_every,
            evaluate_samples=self.evaluate_samples,
            sharding=self.sharding,
        )
        return with_defaults_of(options, folder, saved is None, self.masters is None)


def names_of(text: str) -> tuple[str, ...]:
    """The names in a comma-separated list."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def finetune(
    *,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The checkpoint to start from: a folder or a hub id.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Conversations in Qwen-VL's fine-tuning JSON.")],
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to create.")],
    options: TrainingOptions,
    held_out: Annotated[
        Path | None,
        typer.Option(
            "--held-out", metavar="FILE", help="Conversations to evaluate on: loss, exact answers, overlap of boxes."
        ),
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave faulty records out.")] = False,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda or cuda:N.")] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check model and data, print what a run does, and exit.")
    ] = False,
    download: Download = False,
    hub: Hub = "huggingface",
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Fine-tune a checkpoint on conversations: all of it, or a LoRA adapter.

    OUT becomes a checkpoint (full), or an adapter in peft's files (lora, qlora), with log.jsonl and curve.png.
    Ctrl-C saves a state and stops. Rerun the same command to resume after the last saved one, even after kill -9.

    [cyan]qvl finetune Qwen/Qwen-VL-Chat train.json my-adapter[/cyan]

    [cyan]qvl finetune Qwen/Qwen-VL-Chat-Int4 train.json my-adapter --method qlora --held-out test.json[/cyan]

    [cyan]torchrun --nproc-per-node 2 -m qvl_runtime.cli finetune MODEL train.json OUT --sharding data[/cyan]
    """
    with ExitStack() as stack:
        with working(f"reading {model} and {data}"):
            from qvl_runtime.finetune.parallel import joined_team
            from qvl_runtime.finetune.run import Finetuning
            from qvl_runtime.finetune.trainer import StoppedError
            from qvl_runtime.host import choose_device

            folder = model_folder(model, download, hub)
            chosen = options.resolve(folder)
            team = stack.enter_context(joined_team(chosen.sharding))
            job = opened(Finetuning, folder, data, destination, chosen, held_out, skip_bad, choose_device(device))
        quiet = quiet or not team.leads
        if not quiet or dry_run:
            for line in outline_lines(job):
                say(line)
        if dry_run:
            return 0
        show = stack.enter_context(progress_bar("steps", None if dry_run else job.num_steps, shown=not quiet))

        def on_start(trainer: Trainer) -> None:
            stack.enter_context(stopping(trainer))
            if not quiet:
                done = f", {trainer.step} of them done" if trainer.step else ""
                say(f"{len(trainer.steps)} steps{done}; log and states are in {trainer.folder.home}")

        try:
            entries = job.run(team, lambda done, total: show(done), on_start)
        except StoppedError as stopped:
            if team.leads:
                say(f"{stopped}, which is saved: run the same command again to resume")
            raise KeyboardInterrupt from stopped
    last = entries[-1]
    if as_json and team.leads:
        print_json(last)
    elif not quiet:
        names = [name for name in SCORES if last.get(name) is not None]
        scores = ", ".join(f"{name} {last[name]:.3f}" for name in names)
        say(f"wrote {destination}: {scores}")
        if last["skipped"]:
            say_warning(f"{last['skipped']} samples were skipped: unreadable images, or a loss that is not finite")
    return 0


@contextmanager
def stopping(trainer: Trainer) -> Iterator[None]:
    """Meanwhile Ctrl-C and SIGTERM end the run after its step, with the state saved; a second one ends it at once."""

    def stop(number: int, frame: object) -> None:
        for each in usual:
            signal.signal(each, signal.default_int_handler)
        if trainer.team.leads:
            say("stopping after this step; once more to stop at once, without saving it")
        trainer.stop()

    usual = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def opened(kind: type[Finetuning], *arguments: Any) -> Finetuning:
    """Open a run; each fault of its data is printed on a line of its own before the error."""
    from qvl_runtime.finetune.data import FaultyDataError

    try:
        return kind.open(*arguments)
    except FaultyDataError as error:
        for fault in error.faults[:MAX_LISTED]:
            say(str(fault))
        raise


def outline_lines(job: Finetuning) -> list[str]:
    """What the run reads and trains."""
    data, options = job.data, job.options
    left_out = [f"{count} {reason}" for reason, count in data.left_out.items()]
    left_out += [f"{len(data.faults)} faulty"] if data.faults else []
    return [
        f"{len(data.samples)} conversations of {data.path}: {data.num_tokens:,} tokens, {data.num_targets:,} of them "
        f"learned{'; left out: ' + ', '.join(left_out) if left_out else ''}",
        f"method {options.method}, {options.epochs} epochs, {job.num_steps} steps",
    ]
