"""What makes a function a command of `qvl`: exit codes, one line for an error, options spread out."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import typer

from qvl_runtime.cli.options import with_options
from qvl_runtime.cli.terminal import INTERRUPTED, say, say_error
from qvl_runtime.errors import QVLError

P = ParamSpec("P")


def add_command(app: typer.Typer, function: Callable[..., int]) -> Callable[..., int]:
    """Make the function, which returns an exit code, a command of `app`."""
    app.command()(with_options(reported(function)))
    return function


def reported(command: Callable[P, int]) -> Callable[P, None]:
    """Turn what a command returns or raises into an exit code and, for an error, one line."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            code = command(*args, **kwargs)
        except KeyboardInterrupt:
            say("interrupted")
            code = INTERRUPTED
        except BrokenPipeError:
            raise  # the reader has gone, as in `qvl … | head`; typer ends in silence
        except Exception as error:
            if kwargs.get("debug"):
                raise
            expected = isinstance(error, (QVLError, OSError))
            say_error(error if expected else f"{type(error).__name__}: {error} (a fault of qvl; --debug shows where)")
            code = 2 if expected else 1
        raise typer.Exit(code)

    return run
