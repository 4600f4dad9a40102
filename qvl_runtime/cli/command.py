"""Turn a function into a `qvl` command: exit codes, one-line errors, option groups as options."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import typer

from qvl_runtime.cli.options import with_options
from qvl_runtime.cli.terminal import INTERRUPTED, say, say_error
from qvl_runtime.errors import QVLError, StepError

P = ParamSpec("P")


def add_command(app: typer.Typer, function: Callable[..., int]) -> None:
    """Register `function`, which returns an exit code, as a command of `app` under its own name."""
    app.command()(with_options(exit_with(function)))


def exit_with(command: Callable[P, int]) -> Callable[P, None]:
    """Turn the return value or exception of a command into an exit code and, for an error, one line."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            code = command(*args, **kwargs)
        except KeyboardInterrupt:
            say("interrupted")
            code = INTERRUPTED
        except BrokenPipeError:
            raise  # the reader is gone, as in `qvl … | head`; typer exits silently
        except Exception as error:
            if kwargs.get("debug"):
                raise
            expected = isinstance(error, (QVLError, OSError)) and not isinstance(error, StepError)
            say_error(error if expected else f"{type(error).__name__}: {error} (a bug in qvl; --debug shows where)")
            code = 2 if expected else 1
        raise typer.Exit(code)

    return run
