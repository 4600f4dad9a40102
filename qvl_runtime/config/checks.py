"""Load and validate JSON configs as fields of dataclasses, with errors that name key and value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from qvl_runtime.errors import ConfigError, QVLError, quoted
from qvl_runtime.reading.json_text import parse_json
from qvl_runtime.reading.regular_files import is_there, read_regular
from qvl_runtime.reading.text import decode

# Numbers that are sampled with are float32: below the smallest normal one a GPU may take them for 0.
SMALLEST_FLOAT32, LARGEST_FLOAT32 = 2.0**-126, 2.0**128 - 2.0**104
LARGEST_INT = 2**63 - 1
LARGEST_JSON = 16 << 20  # bytes: the manifest of a published model has 0.54 million, its index 0.12

_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
_EXPECTED = {"int": "a whole number", "float": "a number", "bool": "True or False"}


def read_json(path: Path, error: type[QVLError] = ConfigError) -> dict[str, Any]:
    """Read a JSON object from a file; raise `error` if it does not exist, cannot be parsed or is no object."""
    try:
        data = read_regular(path, error, LARGEST_JSON)
    except FileNotFoundError:
        found = "is a link to a file that is missing" if is_there(path) else "does not exist"
        raise error(f"{path} {found}; expected a checkpoint folder with a {path.name} in it") from None
    content = parse_json(decode(data, str(path), error), str(path), error, "correct it, or fetch the file again")
    if not isinstance(content, dict):
        raise error(f"{path} holds a JSON {type(content).__name__}; expected an object")
    return content


def read_fields(cls: type, raw: Mapping[str, Any], where: str, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the fields of dataclass `cls` that `raw` has, except `skip`; null counts as absent.

    Raises `ConfigError` for a missing field without a default, and for a value that is not of the declared type
    or not finite.
    """
    values: dict[str, Any] = {}
    for field in fields(cls):
        value = raw.get(field.name)
        if field.name in skip:
            continue
        if value is None:
            if field.default is MISSING:
                raise ConfigError(f"{where} has no {field.name!r}; expected one, as in the released checkpoints")
            continue
        declared = str(field.type).removesuffix(" | None")
        if not isinstance(value, _TYPES[declared]) or (isinstance(value, bool) and declared != "bool"):
            raise ConfigError(f"{where} has {field.name} {value!r}; expected a value of type {declared}")
        if isinstance(value, int) and abs(value) > LARGEST_INT:
            raise ConfigError(f"{where} has {field.name} {quoted(value)}; expected a number of at most 63 bits")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{where} has {field.name} {value}; expected a finite number")
        values[field.name] = float(value) if isinstance(value, int) and declared == "float" else value
    return values


def require_types(config: Any) -> None:
    """Set the fields of `config` that are whole numbers to ints, and raise `ConfigError` for values of another type.

    Whole numbers may be numpy's, or floats such as 4e9, of at most 63 bits. Fields declared as something else than
    an int, a float or a bool, or None, are left alone.
    """
    for field in fields(config):
        value, declared = getattr(config, field.name), str(field.type).removesuffix(" | None")
        if declared not in _EXPECTED or (value is None and declared != field.type):
            continue
        is_flag = isinstance(value, bool)
        is_number = isinstance(value, Real) and not is_flag
        if declared == "int" and is_number and value == value // 1:
            value = int(value)
            if abs(value) > LARGEST_INT:
                raise ConfigError(f"{field.name} is {quoted(value)}; expected a number of at most 63 bits")
            object.__setattr__(config, field.name, value)
        elif declared == "float" and is_number:
            continue
        elif not isinstance(value, _TYPES[declared]) or is_flag != (declared == "bool"):
            raise ConfigError(f"{field.name} is {quoted(value)}; expected {_EXPECTED[declared]}")


def require_object(value: Any, name: str) -> Mapping[str, Any]:
    """Return the JSON object `name` of config.json, or raise `ConfigError` if it is something else."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"config.json has {name} {value!r}; expected an object")
    return value


def require_positive(config: Any, prefix: str, *names: str) -> None:
    """Raise `ConfigError` unless the fields `names` of `config` are positive and finite; prefix: of their names."""
    for name in names:
        value = getattr(config, name)
        if not 0 < value < math.inf:
            raise ConfigError(f"{prefix}{name} is {value}; expected a positive number")


def require_at_most(config: Any, prefix: str, limits: Mapping[str, float]) -> None:
    """Raise `ConfigError` for a field of `config` that is larger than its limit; prefix: of their names."""
    for name, most in limits.items():
        value = getattr(config, name)
        if value > most:
            raise ConfigError(f"{prefix}{name} is {quoted(value)}; supported are values up to {most:,}")


def require_divides(name: str, value: int, by_name: str, by: int) -> None:
    """Raise `ConfigError` unless `value` is a multiple of `by`."""
    if value % by:
        raise ConfigError(f"{name} is {value}; expected a multiple of {by} ({by_name})")


def require_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise `ConfigError` unless `value` is one of `choices`."""
    if not isinstance(value, (str, Integral)) or isinstance(value, bool) or value not in choices:
        raise ConfigError(f"{name} is {quoted(value)}; supported are {', '.join(map(repr, choices))}")
