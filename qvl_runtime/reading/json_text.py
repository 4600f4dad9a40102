"""JSON from outside: whatever stands in it, plain values of bounded depth, or an error of one line."""

from __future__ import annotations

import json
from typing import Any

from qvl_runtime.errors import QVLError, quoted

MAX_DEPTH = 64  # levels of lists and objects: published files have four, conversations with boxes seven
_WHITESPACE = " \t\n\r"  # JSON's own


def parse_json(text: str, where: str, error: type[QVLError], way_out: str = "correct it", finite: bool = False) -> Any:
    """Parse one JSON value.

    Raises `error`, which names `where` and ends in `way_out`, for text that is not JSON, for more than `MAX_DEPTH`
    levels, for an object with two values under one key, for whole numbers of thousands of digits, and if `finite` for
    the NaN and Infinity that JSON does not have.
    """
    value, end = parse_json_at(text, len(text) - len(text.lstrip(_WHITESPACE)), where, error, way_out, finite)
    if rest := text[end:].strip(_WHITESPACE):
        raise error(f"{where} has {quoted(rest[:40])} after the end of its JSON: {way_out}")
    return value


def parse_json_at(
    text: str,
    position: int,
    where: str,
    error: type[QVLError],
    way_out: str = "correct it",
    finite: bool = False,
) -> tuple[Any, int]:
    """Parse the JSON value that begins at `position`; returns it and its end. Raises as `parse_json` does."""
    try:
        value, end = (_FINITE if finite else _DECODER).raw_decode(text, position)
    except RecursionError:
        raise error(_too_deep(where, way_out)) from None
    except json.JSONDecodeError as cause:
        raise error(f"{where} is not JSON ({cause}): {way_out}") from None
    except _RepeatedKeyError as cause:
        raise error(f"{where} has two values under the key {quoted(cause.args[0])}: remove one of them") from None
    except _NotFiniteError as cause:
        raise error(f"{where} has {cause.args[0]}, which is not JSON: {way_out}") from None
    except ValueError:  # Python refuses to convert them: their time grows with the square of their length
        raise error(f"{where} holds a number of thousands of digits: {way_out}") from None
    if is_deeper(value, MAX_DEPTH):
        raise error(_too_deep(where, way_out))
    return value, end


def is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested deeper than `levels`, without recursion."""
    nested: list[Any] = [value] if isinstance(value, (list, dict)) else []
    for _ in range(levels):
        values = (entry for outer in nested for entry in (outer.values() if isinstance(outer, dict) else outer))
        nested = [entry for entry in values if isinstance(entry, (list, dict))]
        if not nested:
            return False
    return bool(nested)


class _RepeatedKeyError(ValueError):
    """The key, as the only argument."""


class _NotFiniteError(ValueError):
    """The name of the constant, as the only argument."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs. A key may be repeated with an equal value, which is harmless."""
    values = dict(pairs)
    if len(values) < len(pairs):
        for key, value in pairs:
            if values[key] is not value and values[key] != value:
                raise _RepeatedKeyError(key)
    return values


def _refuse_constant(name: str) -> None:
    raise _NotFiniteError(name)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
_FINITE = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)


def _too_deep(where: str, way_out: str) -> str:
    return f"{where} is nested more than {MAX_DEPTH} levels deep: {way_out}"
