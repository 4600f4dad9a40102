"""Check what an answer is asked to follow: a JSON Schema, a regular expression, a choice, a grammar or boxes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from qvl_runtime.errors import ConstraintError, quoted
from qvl_runtime.reading.json_text import MAX_DEPTH, is_deeper, parse_json

MAX_GUIDE = 1 << 18  # characters of a schema, an expression or a grammar
MAX_OPTIONS, MAX_OPTION = 1000, 1000  # of a choice, and characters of each
GUIDES = ("json_schema", "json_object", "regex", "choice", "grammar", "boxes")


class Guide(NamedTuple):
    """What llguidance compiles: "json", "regex" or "lark", and its text. `name` is that of the parameter."""

    kind: str
    text: str
    name: str


class SchemaText(str):
    """A checked schema as JSON text in one line, which is not checked again."""

    __slots__ = ()


def schema(value: Any) -> SchemaText | None:
    """Return a schema, an object or its JSON text, as text. Raises `ConstraintError` for anything else."""
    if value is None or isinstance(value, SchemaText):
        return value
    if isinstance(value, str):
        _check_size("json_schema", value)
        value = parse_json(value, "json_schema", ConstraintError, finite=True)
    if not isinstance(value, Mapping):
        raise ConstraintError(f"json_schema is {quoted(value)}; expected a JSON Schema, as {{'type': 'object'}}")
    value = dict(value)
    if is_deeper(value, MAX_DEPTH):
        raise ConstraintError(
            f"json_schema is nested deeper than {MAX_DEPTH} levels: flatten it, or use $ref and $defs"
        )
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConstraintError(f"json_schema is not JSON ({error}): correct it") from None
    _check_size("json_schema", text)
    return SchemaText(text)


def text(name: str, value: Any) -> str | None:
    """Return an expression or a grammar. Raises `ConstraintError` for anything that is no text, or is empty or long."""
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip():
        raise ConstraintError(f"{name} is {quoted(value)}; expected a string that is not empty")
    _check_size(name, value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConstraintError(f"{name} has half a character (a lone surrogate): remove it") from None
    return str(value)


def choice(value: Any) -> tuple[str, ...] | None:
    """Return the answers to choose from. Raises `ConstraintError` for others than strings, and too many or too long."""
    if value is None:
        return None
    if not isinstance(value, (tuple, list)) or not value or not all(isinstance(one, str) and one for one in value):
        raise ConstraintError(f"choice is {quoted(value)}; expected strings of at least one character")
    if len(value) > MAX_OPTIONS or any(len(one) > MAX_OPTION for one in value):
        raise ConstraintError(
            f"choice has {len(value)} strings, the longest of {max(map(len, value))} characters; expected at most "
            f"{MAX_OPTIONS}, of at most {MAX_OPTION} characters"
        )
    for one in value:
        text("choice", (one.strip() and one) or "x")
    return tuple(map(str, value))


def only_one(params: Any) -> None:
    """Raise `ConstraintError` if an answer is asked to follow two of them."""
    asked = [name for name in GUIDES if getattr(params, name) not in (None, False)]
    if len(asked) > 1:
        raise ConstraintError(f"{' and '.join(asked)} are set, but an answer follows only one: drop the others")


def guide_of(params: Any) -> Guide | None:
    """What llguidance has to compile for these parameters; None if nothing."""
    if params.json_schema is not None:
        return Guide("json", params.json_schema, "json_schema")
    if params.json_object:
        return Guide("json", '{"type": "object"}', "json_object")
    if params.regex is not None:
        return Guide("regex", params.regex, "regex")
    if params.choice is not None:
        return Guide("lark", "start: " + " | ".join(json.dumps(one) for one in params.choice), "choice")
    return None if params.grammar is None else Guide("lark", params.grammar, "grammar")


def _check_size(name: str, value: str) -> None:
    if len(value) > MAX_GUIDE:
        raise ConstraintError(f"{name} has {len(value):,} characters; expected at most {MAX_GUIDE:,}")
