"""Turn a function into a `qvl` command: exit codes, one-line errors, option groups as options."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any, ParamSpec, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from qvl_runtime.cli.flags import flag_of, flags_of
from qvl_runtime.cli.options import SamplingOptions
from qvl_runtime.cli.streams import discard_output
from qvl_runtime.cli.terminal import BROKEN_PIPE, BUG, INTERRUPTED, USER_ERROR, say, say_error, use_flags
from qvl_runtime.errors import QVLError, SamplingError, StepError

P = ParamSpec("P")


class _PlainFlags:
    """Flags stand in the help without a type: Typer 0.29 writes `--json <bool>`, as if a value had to follow."""

    def get_params(self, ctx: Any) -> Any:
        """The parameters, of which the flags have no name for a value."""
        params = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False) and param.metavar is None:
                param.metavar = ""
        return params


class Group(_PlainFlags, TyperGroup):
    """A group of commands, whose flags have no type in the help."""


class Command(_PlainFlags, TyperCommand):
    """A command whose arguments may begin with a dash and a space, as the lines of a list do."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line; for a mistaken option, name the way to pass a prompt that begins with a dash."""
        # No option begins with a dash and white space: a leading space, taken off below, makes it an argument.
        masked = {f" {arg}": arg for arg in args if arg[:1] == "-" and arg[1:2].isspace()}
        spaced = [f" {arg}" if f" {arg}" in masked else arg for arg in args]
        try:
            rest: list[str] = super().parse_args(ctx, spaced)
        except Exception as error:
            wrong = getattr(error, "option_name", None)
            if type(error).__name__ == "NoSuchOption" and any(
                " " in arg for arg in args if arg.startswith(str(wrong)[:2])
            ):
                error.message += " (a prompt that begins with a dash goes last, after --)"  # type: ignore[attr-defined]
            raise
        for name, value in ctx.params.items():
            if isinstance(value, str):
                ctx.params[name] = masked.get(value, value)
            elif isinstance(value, (list, tuple)):
                ctx.params[name] = type(value)(masked.get(v, v) if isinstance(v, str) else v for v in value)
        return rest


def add_command(app: typer.Typer, function: Callable[..., int]) -> None:
    """Register `function`, which returns an exit code, as a command of `app` under its own name."""
    app.command(cls=Command)(with_options(exit_with(function)))


def exit_with(command: Callable[P, int]) -> Callable[P, None]:
    """Turn the return value or exception of a command into an exit code and, for an error, one line."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        use_flags(_flags(command))
        try:
            code = command(*args, **kwargs)
            sys.stdout.flush()
        except KeyboardInterrupt:
            say("interrupted")
            code = INTERRUPTED
        except BrokenPipeError:  # nothing reads the output any longer, as in `qvl ... | head`
            discard_output()
            code = BROKEN_PIPE
        except SystemExit as error:
            if not isinstance(error.__context__, BrokenPipeError):
                raise
            code = BROKEN_PIPE  # rich noticed it
        except Exception as error:
            if kwargs.get("debug"):
                raise
            expected = isinstance(error, (QVLError, OSError)) and not isinstance(error, StepError)
            if isinstance(error, SamplingError):  # of the command line: the requests of a batch have lines of their own
                use_flags(_flags(command, sampling=True))
            say_error(error if expected else f"{type(error).__name__}: {error} (a bug in qvl; --debug shows where)")
            discard_output()
            code = USER_ERROR if expected else BUG
        raise typer.Exit(code)

    return run


def _flags(command: Callable[..., int], sampling: bool = False) -> dict[str, str]:
    """The options of a command by parameter, those for sampling only if asked: a file may have the same names."""
    flags: dict[str, str] = {}
    for name, hint in get_type_hints(command, include_extras=True).items():
        if not (is_dataclass(hint) and isinstance(hint, type)):
            flags[name] = flag_of(name, hint)
        elif sampling or hint is not SamplingOptions:
            flags |= flags_of(hint)
    return flags


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Expand each parameter whose type is a dataclass into its fields, which typer sees as options."""
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if is_dataclass(hint) and isinstance(hint, type)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if (group := groups.get(parameter.name)) is None:
            parameters.append(parameter.replace(annotation=hints[parameter.name], kind=parameter.KEYWORD_ONLY))
            continue
        field_hints = get_type_hints(group, include_extras=True)
        parameters += [
            inspect.Parameter(f.name, parameter.KEYWORD_ONLY, default=f.default, annotation=field_hints[f.name])
            for f in fields(group)
        ]

    @wraps(command)
    def run(**values: Any) -> None:
        built_groups = {
            name: group(**{f.name: values.pop(f.name) for f in fields(group)}) for name, group in groups.items()
        }
        command(**values, **built_groups)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del run.__wrapped__
    return run
