"""The `qvl` command: its help, its exit codes and its list of subcommands, one file each.

Exit codes: 0 success, 1 a bug in qvl, 2 an error that the user can fix (described on one line), 3 `qvl batch` answered
some requests with an error, 130 Ctrl-C, 141 the reader of the output is gone.
Nothing heavy is imported before a command runs, so that `qvl --help` answers at once.
"""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Annotated

import typer

from qvl_runtime import __version__
from qvl_runtime.cli.batch import batch
from qvl_runtime.cli.calibrate import calibrate
from qvl_runtime.cli.chat import chat
from qvl_runtime.cli.check import check
from qvl_runtime.cli.command import Group, add_command
from qvl_runtime.cli.convert import convert
from qvl_runtime.cli.demo import demo
from qvl_runtime.cli.evaluate import evaluate
from qvl_runtime.cli.finetune import finetune
from qvl_runtime.cli.generate import generate
from qvl_runtime.cli.info import info
from qvl_runtime.cli.locate import locate
from qvl_runtime.cli.merge import merge
from qvl_runtime.cli.plan import plan
from qvl_runtime.cli.profile import profile_app
from qvl_runtime.cli.quantize import quantize
from qvl_runtime.cli.serve import serve
from qvl_runtime.cli.streams import discard_output, prepare
from qvl_runtime.cli.terminal import BROKEN_PIPE, USER_ERROR, LogLines, say_error, say_warning
from qvl_runtime.cli.verify import verify

COMMANDS = (
    generate,
    chat,
    batch,
    locate,
    serve,
    info,
    demo,
    convert,
    verify,
    quantize,
    finetune,
    merge,
    plan,
    evaluate,
    check,
    calibrate,
)

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"qvl {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Run Qwen-VL: images and a question in, text and boxes out.

    [bold]Try it with the small model that ships with qvl:[/bold]

    [cyan]qvl demo[/cyan]

    [cyan]qvl chat[/cyan]

    [bold]Ask about your own image, with a published model:[/bold]

    [cyan]qvl generate "What is this?" -i dog.jpg --model Qwen/Qwen-VL-Chat-Int4 --download[/cyan]

    [cyan]qvl generate "Box the dog" -i dog.jpg --draw boxed.png[/cyan]

    [bold]Exit codes:[/bold] 0 success, 1 a bug in qvl, 2 an error to fix, 3 requests of a batch failed, 130 Ctrl-C,
    141 nothing reads the output any longer.
    """


for command in COMMANDS:
    add_command(app, command)
app.add_typer(profile_app, name="profile")


def main() -> None:
    """Run the command line: the entry point of `qvl`."""
    prepare()
    logging.getLogger("qvl_runtime").addHandler(LogLines(logging.WARNING))
    warnings.showwarning = lambda message, *_, **__: say_warning(message)
    try:
        app()
    except OSError as error:  # of the help or a usage error: commands report their own
        say_error(error)
        discard_output()
        sys.exit(USER_ERROR)
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich and typer turn it into code 1
            sys.exit(BROKEN_PIPE)
        raise
