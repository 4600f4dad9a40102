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

from qvl_runtime.cli.command import add_command
from qvl_runtime.cli.options import OUTPUT, AsJson, Debug, ModelOptions, Quiet, SamplingOptions
from qvl_runtime.cli.profile import profile_app
from qvl_runtime.cli.terminal import (
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
from qvl_runtime.cli.weights_cli import convert, plan, quantize, verify
from qvl_runtime.errors import PromptError

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
    typer.Option(metavar="FILE", help="Write the image with the answer's boxes here.", rich_help_panel=OUTPUT),
]
Out = Annotated[Path, typer.Option(metavar="FILE", help="Where to write the image with the boxes drawn.")]


def command(function: Callable[..., int]) -> Callable[..., int]:
    """Make the function a command of `qvl`; it returns an exit code."""
    return add_command(app, function)


@app.callback()
def root() -> None:
    """Run Qwen-VL: images and a question in, words and boxes out.

    [bold]To try it, without a download:[/bold]

    [cyan]qvl demo[/cyan]

    [cyan]qvl chat[/cyan]

    [bold]With an image and a model of yours:[/bold]

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
    from qvl_runtime.cli.chat import ChatSession, converse

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
    from qvl_runtime.cli.batch import count_records, resume_at, run_batch

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
def info(*, models: ModelOptions, as_json: AsJson = False, debug: Debug = False) -> int:
    """Say what is here: versions, device, kernels, the model's size; and what each missing part costs.

    Reads no weights, so it is quick for a model of any size.
    """
    from qvl_runtime.cli.info import examine, show

    report = examine(models)
    if as_json:
        print(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        show(report)
    return 0


@command
def demo(*, out: Out = Path("out/demo.png"), models: ModelOptions, debug: Debug = False) -> int:
    """Caption an image that comes with qvl, answer a question about it, box an object, and say how fast."""
    from qvl_runtime.cli.demo import run

    out.parent.mkdir(parents=True, exist_ok=True)
    run(models.open(), drawable(out))
    return 0


for weights_command in (convert, verify, quantize, plan):
    command(weights_command)
app.add_typer(profile_app, name="profile")


def main() -> None:
    """Entry point of `qvl`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # without UTF-8 a Chinese word becomes '?', not a traceback
    logging.getLogger("qvl_runtime").addHandler(LogLines(logging.WARNING))
    warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
    app()
