"""Dataclasses from the JSON of a stranger: each field of its declared type, or an error that names it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from qvl_runtime.config.checks import LARGEST_INT
from qvl_runtime.errors import CheckpointError, quoted

T = TypeVar("T")
_WAY_OUT = "convert the source again"
_PLAIN: Mapping[str, tuple[type, str]] = {
    "str": (str, "a text"),
    "int": (int, "a whole number from 0 on"),
    "bool": (bool, "true or false"),
}


def read_record(cls: type[T], raw: object, where: str, kinds: Mapping[str, type] | None = None) -> T:
    """An instance of the dataclass `cls` with the fields of the JSON object `raw`.

    Fields are str, int, bool, list[..], dict[str, ..] of these, or dataclasses of `kinds`, by name. Raises
    `CheckpointError` for a missing or unknown field, and for a value of another type.
    """
    declared = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]  # a dataclass
    content = _mapping(raw, where)
    if unknown := [key for key in content if key not in declared]:
        raise CheckpointError(f"{where} has the key {quoted(unknown[0])}, which this version does not know: {_WAY_OUT}")
    values = {}
    for name, field in declared.items():
        if name in content:
            values[name] = _typed(content[name], str(field.type), f"{where}, {name}", kinds or {})
        elif field.default is MISSING and field.default_factory is MISSING:
            raise CheckpointError(f"{where} has no {name!r}: {_WAY_OUT}")
    return cls(**values)


def check_once(names: Iterable[str], kind: str, where: str) -> None:
    """Raise `CheckpointError` for a name that is there twice; kind: of what."""
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise CheckpointError(f"{where} has the {kind} {quoted(repeated[0])} twice: convert the source again")


def _typed(value: object, declared: str, where: str, kinds: Mapping[str, type]) -> Any:
    if declared.startswith("dict[str, "):
        of, content = declared[len("dict[str, ") : -1], _mapping(value, where)
        if of == "str" and all(type(v) is str and v.isascii() and key.isascii() for key, v in content.items()):
            return dict(content)  # the thousands of digests of a manifest, without a place made up for each
        return {
            _typed(key, "str", where, kinds): _typed(entry, of, f"{where}, {quoted(key)}", kinds)
            for key, entry in content.items()
        }
    if declared.startswith("list["):
        if not isinstance(value, list):
            raise CheckpointError(f"{where} is {quoted(value)}; expected a list: {_WAY_OUT}")
        return [_typed(entry, declared[len("list[") : -1], where, kinds) for entry in value]
    if declared in kinds:
        return read_record(kinds[declared], value, where, kinds)
    kind, expected = _PLAIN[declared]
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if isinstance(value, int) and not 0 <= value <= LARGEST_INT:
        fits = False
    if isinstance(value, str) and not value.isascii():
        fits = fits and _is_utf8(value)
    if not fits:
        raise CheckpointError(f"{where} is {quoted(value)}; expected {expected}: {_WAY_OUT}")
    return value


def _mapping(raw: object, where: str) -> Mapping[str, Any]:
    if not isinstance(raw, dict):
        raise CheckpointError(f"{where} is {quoted(raw)}; expected an object: {_WAY_OUT}")
    return raw


def _is_utf8(text: str) -> bool:
    """Whether a text can be written: JSON can spell half of a pair of surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
