"""Check the values of sampling parameters, and convert them to the types of Python.

Kernels sample in float32, so the ranges are those of float32: there 1e-46 would be 0 and 1e300 infinite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from qvl_runtime.config.checks import LARGEST_FLOAT32
from qvl_runtime.errors import SamplingError, quoted


class Biases(dict[int, float]):
    """Checked biases by token id, not to be changed: they are not checked again."""


def whole(name: str, value: Any, least: int, most: int, expected: str) -> int:
    """Return a whole number, of numpy too, as an int. Raises `SamplingError` if it is none, or out of range."""
    number = _whole(value)
    if number is None:
        raise _error(name, value, f"a whole number, {expected}")
    if not least <= number <= most:
        raise _error(name, value, expected)
    return number


def real(name: str, value: Any, least: float, most: float, expected: str) -> float:
    """Return a number, of numpy too, as a float. Raises `SamplingError` if it is none, NaN, or out of range."""
    number = _real(value)
    if number is None:
        raise _error(name, value, f"a number, {expected}")
    if not least <= number <= most:
        raise _error(name, value, expected)
    return number


def flag(name: str, value: Any) -> bool:
    """Return True or False, of numpy too. Raises `SamplingError` for anything else, such as "yes", 1 or an array."""
    if isinstance(value, bool):
        return value
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise _error(name, value, "True or False")


def text(name: str, value: Any) -> str:
    """Return a string. Raises `SamplingError` for anything else."""
    if not isinstance(value, str):
        raise _error(name, value, "a string")
    return value


def stop_strings(value: Any, count: int, length: int) -> tuple[str, ...]:
    """Return one string or several as a tuple. Raises `SamplingError` for others, an empty, a long or too many."""
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, (tuple, list)) or not all(isinstance(one, str) and one for one in strings):
        raise _error("stop", value, "strings of at least one character")
    if len(strings) > count or any(len(one) > length for one in strings):
        raise SamplingError(
            f"stop has {len(strings)} strings, the longest of {max(map(len, strings))} characters; every token is "
            f"compared with each, so expected at most {count}, of at most {length} characters"
        )
    return tuple(strings)


def ids(name: str, value: Any) -> tuple[int, ...]:
    """Return token ids as a tuple of ints. Raises `SamplingError` for other values."""
    numbers = tuple(map(_whole, value)) if isinstance(value, (tuple, list)) else (None,)
    if None in numbers:
        raise _error(name, value, "token ids, whole numbers")
    return numbers  # type: ignore[return-value]


def biases(value: Any) -> Biases:
    """Return the numbers by token id. Raises `SamplingError` for others, for NaN, and for what float32 cannot hold.

    Below its range a bias is -inf, which forbids the token.
    """
    if isinstance(value, Biases):
        return value
    if not isinstance(value, Mapping):
        raise _error("logit_bias", value, "a mapping of token ids to numbers")
    checked = Biases()
    for given, bias in value.items():
        token, number = _whole(given), _real(bias)
        if token is None or number is None or number > LARGEST_FLOAT32:
            expected = "token ids to numbers up to 3.4e38, or -inf, which forbids a token"
            raise _error("logit_bias", {given: bias}, expected)
        checked[token] = -math.inf if number < -LARGEST_FLOAT32 else number
    return checked


def _whole(value: Any) -> int | None:
    """Return a whole number as an int; None for anything else, True and False included."""
    if type(value) is int:
        return value
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def _real(value: Any) -> float | None:
    """Return a number as a float, an int beyond it as an infinity; None for what is no number and for NaN."""
    if type(value) is not float:
        if not isinstance(value, Real) or isinstance(value, bool):
            return None
        try:
            value = float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    return None if value != value else value


def _error(name: str, value: Any, expected: str) -> SamplingError:
    return SamplingError(f"{name} is {quoted(value)}; expected {expected}")
