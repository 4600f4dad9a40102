"""How `qvl finetune` trains: its options on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

if TYPE_CHECKING:
    from qvl_runtime.finetune.labels import LabelKind
    from qvl_runtime.finetune.options import FinetuneOptions, Method

TRAINING, LORA, RUN = "Training", "LoRA", "Run"  # help panels


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
    schedule: Annotated[
        str,
        typer.Option(metavar="NAME", help="The rate after the warm-up: cosine, or constant.", rich_help_panel=TRAINING),
    ] = "cosine"
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
    keep_weight: Annotated[
        float,
        typer.Option(metavar="X", help="Weight of a token of --keep; a learned one has 1.", rich_help_panel=TRAINING),
    ] = 1.0
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
            metavar="NAME",
            help="With torchrun: data (each process has the model), gradients (they and moments are sharded), or fsdp.",
            rich_help_panel=RUN,
        ),
    ] = "none"
    deepspeed: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A DeepSpeed configuration, whose stage sets the sharding.", rich_help_panel=RUN
        ),
    ] = None

    def resolve(self, folder: Path) -> FinetuneOptions:
        """The library's options for a checkpoint. Raises `ConfigError` for a value out of range."""
        from qvl_runtime.finetune.deepspeed_config import with_deepspeed_config
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
            schedule=self.schedule,
            mean=cast("Any", self.mean),
            dtype=self.dtype,
            masters=self.masters or "float32",
            checkpointing=self.checkpointing,
            parts=names_of(self.train),
            lora=lora,
            seed=self.seed,
            keep_weight=self.keep_weight,
            save_every=self.save_every,
            evaluate_every=self.evaluate_every,
            evaluate_samples=self.evaluate_samples,
            sharding=self.sharding,
        )
        if self.deepspeed is not None:
            options = with_deepspeed_config(options, self.deepspeed)
        return with_defaults_of(options, folder, saved is None, self.masters is None)


def names_of(text: str) -> tuple[str, ...]:
    """The names in a comma-separated list."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
