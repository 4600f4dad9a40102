"""Say an error of the library in the words of the command line: `raise max_images` becomes `raise --max-images`.

The library's messages name its parameters, since its readers are programmers. Options have the same names, so that one
rule serves every message: what a reader of the shell is told to set is what `qvl COMMAND --help` lists.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

_VALUE = r"""(?P<equals>=(?P<value>'[^']*'|[\w.]+))?"""


def flags_of(group: type[Any]) -> dict[str, str]:
    """The option of each field of a group of options."""
    hints = get_type_hints(group, include_extras=True)
    return {field.name: flag_of(field.name, hints[field.name]) for field in fields(group)}


def flag_of(name: str, annotation: object) -> str:
    """The option of a parameter: the long name that it declares, or its own."""
    declared: list[Any] = []
    for info in get_args(annotation)[1:] if get_origin(annotation) is Annotated else ():
        # The first name stands as the default, as long as typer has not looked at it.
        declared += [getattr(info, "default", None), *(getattr(info, "param_decls", None) or ())]
    names = [given.split("/")[0] for given in declared if isinstance(given, str) and given.startswith("--")]
    return names[0] if names else f"--{name.replace('_', '-')}"


def as_flags(message: str, flags: Mapping[str, str]) -> str:
    """The message with options instead of the parameters in `flags`, and `--name value` for `name=value`.

    A parameter of one word, such as `device`, is a word of English, too: only its form with a value is replaced. Names
    in quotes, in paths and in calls are left, since they are something else.
    """
    return _pattern(tuple(flags)).sub(lambda match: _as_flag(match, flags), message) if flags else message


@cache
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    return re.compile(rf"(?<![\w/.'\"\[-])(?P<name>{longest_first})\b(?![/(]|\.\w){_VALUE}")


def _as_flag(match: re.Match[str], flags: Mapping[str, str]) -> str:
    name, value = match["name"], match["value"]
    flag = flags[name]
    if value is None:
        return flag if "_" in name and not flag.startswith("--no-") else match[0]
    if value in ("True", "False"):
        return flag if (value == "False") == flag.startswith("--no-") else match[0]
    return f"{flag} {value.strip(chr(39))}"
