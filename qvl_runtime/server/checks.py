"""Check a value against the part of JSON Schema that the table of fields uses; the message names the field.

The same schemas are published at /openapi.json, so what is documented is what is checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from qvl_runtime.errors import quoted
from qvl_runtime.server.errors import APIError, invalid

Schema = Mapping[str, Any]

_IS: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: _is_number(value) and (isinstance(value, int) or value.is_integer()),
    "number": lambda value: _is_number(value),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
    "null": lambda value: value is None,
}
_NAMES = {
    "string": "a string",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


def check(value: Any, schema: Schema, path: str) -> None:
    """Raise `APIError` 400 for a value that `schema` does not allow; `path` names it, as in messages[0].role."""
    if "anyOf" in schema:
        _check_any(value, schema["anyOf"], path)
        return
    if "const" in schema and value != schema["const"]:
        raise _wrong(path, value, quoted(schema["const"]))
    if (types := _types(schema)) and not any(_IS[name](value) for name in types):
        raise _wrong(path, value, " or ".join(_NAMES[name] for name in types))
    if "enum" in schema and value not in schema["enum"]:
        raise _wrong(path, value, ", ".join(map(quoted, schema["enum"])))
    if isinstance(value, str):
        _check_size(len(value), "Length", "characters", schema, path)
    elif isinstance(value, list):
        _check_size(len(value), "Items", "entries", schema, path)
        for index, entry in enumerate(value):
            check(entry, schema.get("items", {}), f"{path}[{index}]")
    elif isinstance(value, dict):
        _check_object(value, schema, path)
    elif _is_number(value):
        low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
        if not low <= value <= high:
            raise _wrong(path, value, f"{low} to {high}" if high < math.inf else f"{low} or more")


def _check_any(value: Any, options: list[Schema], path: str) -> None:
    """Accept a value that one of the schemas allows; the error is that of the one whose type it has."""
    fitting = [option for option in options if any(_IS[name](value) for name in _types(option))]
    if not fitting:
        names = dict.fromkeys(_NAMES[name] for option in options for name in _types(option))
        raise _wrong(path, value, " or ".join(names))
    error: APIError | None = None
    for option in _same_kind(value, fitting, path):
        try:
            check(value, option, path)
            return
        except APIError as found:
            error = error or found
    if error is not None:
        raise error


def _same_kind(value: Any, options: list[Schema], path: str) -> list[Schema]:
    """The options whose constant property, such as the type of a part, is that of the value."""
    constants = [_constants(option) for option in options]
    if not isinstance(value, dict) or not all(constants):
        return options
    same = [o for o, own in zip(options, constants, strict=True) if all(value.get(n) == v for n, v in own.items())]
    if not same:
        name = next(iter(constants[0]))
        if name not in value:
            raise invalid(f"{path}.{name} is missing", f"{path}.{name}", "missing_field")
        raise _wrong(f"{path}.{name}", value[name], " or ".join(quoted(own[name]) for own in constants))
    return same


def _constants(schema: Schema) -> dict[str, Any]:
    return {name: own["const"] for name, own in schema.get("properties", {}).items() if "const" in own}


def _check_object(value: dict[str, Any], schema: Schema, path: str) -> None:
    properties: Mapping[str, Schema] = schema.get("properties", {})
    rest = schema.get("additionalProperties", True)
    for name in schema.get("required", ()):
        if name not in value:
            raise invalid(f"{_joined(path, name)} is missing", _joined(path, name), "missing_field")
    for name, entry in value.items():
        where = _joined(path, name if name.isidentifier() and len(name) < 100 else quoted(name, 40))
        if name in properties:
            check(entry, properties[name], where)
        elif rest is False:
            allowed = ", ".join(properties)
            raise invalid(f"{where} is not known here; expected {allowed}", where, "unknown_field")
        elif isinstance(rest, Mapping):
            check(entry, rest, where)


def _check_size(size: int, keyword: str, unit: str, schema: Schema, path: str) -> None:
    low, high = schema.get(f"min{keyword}", 0), schema.get(f"max{keyword}", math.inf)
    if not low <= size <= high:
        expected = f"{low} to {high}" if high < math.inf else f"at least {low}"
        raise invalid(f"{path} has {size:,} {unit}; expected {expected}", path, "invalid_value")


def _wrong(path: str, value: Any, expected: str) -> APIError:
    return invalid(f"{path} is {quoted(value)}; expected {expected}", path, "invalid_value")


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _types(schema: Schema) -> list[str]:
    types = schema.get("type", [])
    return [types] if isinstance(types, str) else list(types)


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)
