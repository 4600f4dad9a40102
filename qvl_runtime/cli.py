"""The command `qvl`: its help, its exit codes, and which part of the program does what was asked.

Exit codes: 0 done, 1 a fault of the program itself, 2 something the user can mend (one line says what), 130 Ctrl-C.
Nothing heavy is imported before a command runs, so that `qvl --help` answers at once.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from qvl_runtime.commands import add_command
from qvl_runtime.errors import PromptError
from qvl_runtime.options import OUTPUT, ModelOptions, SamplingOptions
from qvl_runtime.profile.commands import profile_app
from qvl_runtime.terminal import (
    INTERRUPTED,
    LogLines,
    answer_json,
    box_lines,
    content,
    drawable,
    progress_bar,
    rate,
    receive,
    save_drawing,
    say,
    speed_line,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)

Images = Annotated[
    list[str] | None,
    typer.Option("--image", "-i", metavar="PICTURE", help="A file, http(s) address or data URL; repeat for several."),
]
System = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Instead of the system text 'You are a helpful assistant.'")
]
Raw = Annotated[
    bool, typer.Option("--raw", help="No chat format: continue PROMPT as it stands, with <img>FILE</img> honoured.")
]
Draw = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the picture with the answer's boxes here.", rich_help_panel=OUTPUT),
]
Out = Annotated[Path, typer.Option(metavar="FILE", help="Where to write the picture with the boxes drawn.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object, for programs.", rich_help_panel=OUTPUT)]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="The answer only: no notes, no speed.", rich_help_panel=OUTPUT)
]
Debug = Annotated[bool, typer.Option("--debug", help="On an error show the whole traceback.", rich_help_panel=OUTPUT)]


def command(function: Callable[..., int]) -> Callable[..., int]:
    """Make the function a command of `qvl`; it returns an exit code."""
    return add_command(app, function)


app.add_typer(profile_app, name="profile")


@app.callback()
def root() -> None:
    """Run Qwen-VL: pictures and a question in, words and boxes out.

    [bold]To try it, without a download:[/bold]

    [cyan]qvl demo[/cyan]

    [cyan]qvl chat[/cyan]

    [bold]With a picture and a model of yours:[/bold]

    [cyan]qvl generate "What is this?" -i dog.jpg --model Qwen/Qwen-VL-Chat-Int4 --download[/cyan]

    [cyan]qvl generate "Box the dog" -i dog.jpg --draw boxed.png[/cyan]
    """


@command
def generate(
    *,
    prompt: Annotated[str, typer.Argument(help="What to say to the model; - reads it from standard input.")],
    image: Images = None,
    system: System = None,
    raw: Raw = False,
    models: ModelOptions,
    sampling: SamplingOptions,
    as_json: AsJson = False,
    draw: Draw = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Answer one prompt, as the words come.

    [cyan]qvl generate "What number is on the plate?" -i car.jpg --temperature 0[/cyan]

    [cyan]qvl generate "图里有什么?" -i one.jpg -i two.jpg[/cyan]

    [cyan]qvl generate "Box the dog" -i dog.jpg --draw boxed.png --json[/cyan]

    [cyan]echo "Describe it" | qvl generate - -i dog.jpg --quiet[/cyan]
    """
    text = sys.stdin.read().strip() if prompt == "-" else prompt
    images = image or []
    if raw and system is not None:
        raise PromptError("--system belongs to the chat format, which --raw turns off; leave one of them out")
    if draw is not None:
        drawable(draw)
    params, engine = sampling.params(), models.open()
    if not quiet and (note := engine.defaults_note(params)):
        say(f"note: {note}")
    if raw:
        pieces = engine.stream([*({"image": source} for source in images), {"text": text}] if images else text, params)
    else:
        opening = [] if system is None else [{"role": "system", "content": system}]
        pieces = engine.chat([*opening, {"role": "user", "content": content(text, images)}], params, stream=True)
    answer = receive(pieces, echo=not as_json)
    drawn = save_drawing(answer.completion, draw) if answer.completion is not None and draw is not None else None
    if as_json:
        print(answer_json(answer, drawn))
    if answer.completion is None:
        say("interrupted; the answer is not whole")
        return INTERRUPTED
    if not (quiet or as_json) and sys.stderr.isatty():
        for line in [*box_lines(answer.completion), speed_line(answer.completion)]:
            say(line)
    return 0


@command
def chat(
    *,
    image: Images = None,
    system: System = None,
    models: ModelOptions,
    sampling: SamplingOptions,
    debug: Debug = False,
) -> int:
    """Talk with the model, turn by turn; /help there lists what else one can say.

    [cyan]qvl chat --image dog.jpg[/cyan]

    [cyan]printf 'Hello!\\nBox the dog\\n' | qvl chat --image dog.jpg[/cyan]
    """
    from qvl_runtime.repl import ChatSession, converse

    params, engine = sampling.params(), models.open()
    if note := engine.defaults_note(params):
        say(f"note: {note}")
    session = ChatSession(engine, params, system)
    for source in image or []:
        session.attach(source)
    return converse(session)


@command
def batch(
    *,
    requests: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="One request a line.")],
    answers: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="One answer a line, in the same order.")],
    models: ModelOptions,
    sampling: SamplingOptions,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Answer a file of requests, many at a time; started again after a stop, it goes on where it was.

    A line is {"prompt": "What is this?", "images": ["dog.jpg"]}, or {"messages": […]}, or {"raw": "<img>…</img>…"};
    with "id" and "params" if you like. A request that cannot be answered gives a line with "error".

    [cyan]qvl batch questions.jsonl answers.jsonl --temperature 0 --max-tokens 64[/cyan]
    """
    from qvl_runtime.batch import count_records, resume_at, run_batch

    params, total = sampling.params(), count_records(requests)
    before = resume_at(requests, answers)
    if before and not quiet:
        say(f"{before} of {total} are answered already in {answers}")
    engine, last = models.open(), None
    began = time.perf_counter()
    with progress_bar(answers.name, total, before, shown=not quiet) as advance:
        for last in run_batch(engine, requests, answers, params):
            advance(last.done)
    if last is not None and not quiet:
        took = time.perf_counter() - began
        failed = f", {last.errors} of them errors" if last.errors else ""
        say(f"{last.done - before} answers in {took:.1f} s{failed}: {rate(last.tokens / took)}; in {answers}")
    return 0


@command
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
    """Quantise a float checkpoint with GPTQ, into the layout of Qwen-VL-Chat-Int4; vision stays as it is.

    Memory holds one layer at a time. Stopped, even by kill -9, the same command goes on after the last whole layer.

    [cyan]qvl quantize my-finetune my-finetune-int4 --calibration train.json[/cyan]

    [cyan]qvl quantize Qwen/Qwen-VL-Chat chat-int4 --group 64 --plot errors.png[/cyan]
    """
    from qvl_runtime.quantizing import QuantizeRequest, quantize_checkpoint

    asked = QuantizeRequest(
        source, destination, calibration, device, plot, dry_run, as_json, quiet,
        {"method": method, "bits": bits, "group_size": group, "sym": not asym, "order": act_order, "damping": damping,
         "samples": samples, "max_tokens": max_tokens},
    )  # fmt: skip
    return quantize_checkpoint(asked)


@command
def info(*, models: ModelOptions, as_json: AsJson = False, debug: Debug = False) -> int:
    """Say what is here: versions, device, kernels, the model's size; and what each missing part costs.

    Reads no weights, so it is quick for a model of any size.
    """
    from qvl_runtime.doctor import examine, show

    report = examine(models)
    if as_json:
        print(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        show(report)
    return 0


@command
def demo(*, out: Out = Path("out/demo.png"), models: ModelOptions, debug: Debug = False) -> int:
    """Caption a picture that comes with qvl, answer a question about it, box an object, and say how fast."""
    from qvl_runtime.demo import run

    out.parent.mkdir(parents=True, exist_ok=True)
    run(models.open(), drawable(out))
    return 0


@command
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
    from qvl_runtime.weights.hub import resolve_model
    from qvl_runtime.weights_commands import run_convert, run_restore, target_of

    options = target_of(to, {"dtype": dtype, "vision": vision, "head": head})
    folder = resolve_model(source)
    if options is None:
        return run_restore(folder, destination, quiet)
    return run_convert(folder, destination, options, dry_run, quiet)


@command
def verify(
    *,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What `qvl convert` made.")],
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Say whether a converted checkpoint is still what was written, and if not, which tensor of it."""
    from qvl_runtime.weights_commands import run_verify

    return run_verify(folder, quiet)


@command
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
    from qvl_runtime.plan_report import plan_of, show, show_json
    from qvl_runtime.weights.hub import resolve_model
    from qvl_runtime.weights.plan import Choices

    found = plan_of(resolve_model(model), gpu, Choices(dtype, vision, head, kv, embedding_on_host))
    (show_json if as_json else show)(found)
    return 0


def main() -> None:
    """Entry point of `qvl`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # without UTF-8 a Chinese word becomes '?', not a traceback
    logging.getLogger("qvl_runtime").addHandler(LogLines(logging.WARNING))
    warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
    app()
