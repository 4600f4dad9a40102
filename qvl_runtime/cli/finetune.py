"""`qvl finetune`: train a checkpoint, or an adapter for it, on conversations."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvl_runtime.cli.options import AsJson, Debug, Download, Hub, Quiet, model_folder
from qvl_runtime.cli.terminal import print_json, progress_bar, say, say_warning, size, working
from qvl_runtime.cli.training_options import TrainingOptions

if TYPE_CHECKING:
    from qvl_runtime.finetune.run import Finetuning
    from qvl_runtime.finetune.trainer import Trainer

SCORES = ("loss", "divergence", "held_out_loss", "exact", "box_iou")  # of the last line, in this order
MAX_LISTED = 100  # faults of the data that are printed


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
    keep: Annotated[
        Path | None,
        typer.Option(
            "--keep",
            metavar="FILE",
            help="Conversations to keep answering as before: trained towards the model's own predictions.",
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
            job = opened(Finetuning, folder, data, destination, chosen, held_out, skip_bad, choose_device(device), keep)
        quiet = quiet or not team.leads
        if not quiet or dry_run:
            for line in outline_lines(job):
                say(line)
            if is_slow(job):
                say_warning(
                    "this CPU has no bfloat16 products, and torch takes some ten times as long without: "
                    "--dtype float32 avoids that, and takes twice the memory for what is not int4"
                )
        if dry_run:
            return 0
        bars = stack.enter_context(Bars(job, shown=not quiet))

        def on_start(trainer: Trainer) -> None:
            bars.start_steps(trainer.step)
            stack.enter_context(stopping(trainer))
            if trainer.left_out and not quiet:
                count = len(trainer.left_out)
                say_warning(f"{count} conversations to keep are left out: their images could not be read at the start")
            if not quiet:
                done = f", {trainer.step} of them done" if trainer.step else ""
                say(f"{len(trainer.steps)} steps{done}; log and states are in {trainer.folder.home}")
            if not quiet and trainer.saved_by not in (None, team.size):
                say(
                    f"the state was saved by {trainer.saved_by} processes and resumes in {team.size}: they share the "
                    "same micro-batches of a step, so that its sums stay the same"
                )

        try:
            entries = job.run(team, bars.show_steps, on_start, bars.count_kept)
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


class Bars:
    """The progress of a run: the predictions of what is kept, then its steps, in one bar after the other."""

    def __init__(self, job: Finetuning, shown: bool) -> None:
        self._steps, self._shown, self._stack, self._done = job.num_steps, shown, ExitStack(), 0
        self._kept = sum(sample.keep for sample in job.data.samples)

    def __enter__(self) -> Bars:
        shown = self._shown and self._kept > 0
        self._show = self._stack.enter_context(progress_bar("predictions to keep", self._kept, shown=shown))
        if self._shown and not self._kept:
            self._stack.enter_context(working("opening the model"))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def count_kept(self) -> None:
        """One conversation more is predicted."""
        self._done += 1
        self._show(self._done)

    def start_steps(self, done: int) -> None:
        """Show the steps from now on."""
        self._stack.close()
        self._show = self._stack.enter_context(progress_bar("steps", self._steps, done, self._shown))

    def show_steps(self, done: int, total: int) -> None:
        """`done` steps are taken."""
        self._show(done)


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


def is_slow(job: Finetuning) -> bool:
    """Whether the run computes in bfloat16 on a CPU that does not."""
    from qvl_runtime.finetune.opening import training_dtype
    from qvl_runtime.host import has_bfloat16_products

    narrow = str(training_dtype(job.options, job.config)) == "torch.bfloat16"
    return narrow and job.device.type == "cpu" and not has_bfloat16_products()


def outline_lines(job: Finetuning) -> list[str]:
    """What the run reads and trains."""
    from qvl_runtime.finetune.keeping import BYTES

    data, options = job.data, job.options
    kept = sum(sample.keep for sample in data.samples)
    left_out = [f"{count} {reason}" for reason, count in data.left_out.items()]
    left_out += [f"{len(data.faults)} faulty"] if data.faults else []
    remembered = f"predictions of {data.num_kept:,} tokens to keep: {size(BYTES * data.num_kept)} in host memory"
    return [
        f"{len(data.samples) - kept} conversations of {data.path}{f', {kept} conversations to keep' if kept else ''}: "
        f"{data.num_tokens:,} tokens, {data.num_targets:,} of them {'learned or kept' if kept else 'learned'}"
        f"{'; left out: ' + ', '.join(left_out) if left_out else ''}",
        f"method {options.method}, {options.epochs} epochs, {job.num_steps} steps",
        *([f"{remembered}{', in each process' if options.sharding != 'none' else ''}"] if kept else []),
    ]
