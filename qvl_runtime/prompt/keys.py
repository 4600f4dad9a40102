"""Refuse the keys of a message or a part that the model would never see, rather than dropping them in silence."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from qvl_runtime.errors import PromptError, quoted

# Keys that clients add and that change nothing here: names, positions, hints to a cache, sizes for models that have a
# choice (this one sees each image at one size), and what a program or page keeps about an earlier answer.
OF_MESSAGES = frozenset(
    ("type", "id", "name", "status", "cache_control", "annotations", "reasoning", "reasoning_content", "metadata")
) | {"options"}
OF_PARTS = frozenset(
    ("type", "id", "uuid", "name", "cache_control", "annotations", "detail", "min_pixels", "max_pixels")
) | {"resized_height", "resized_width"}
OF_IMAGE_URLS = frozenset(("detail", "format", "mime_type"))


def refuse_unknown(found: Mapping[Any, Any], known: Collection[str], harmless: frozenset[str], where: str) -> None:
    """Raise `PromptError` for keys that are neither known nor harmless, unless their value is nothing."""
    unknown = [key for key, value in found.items() if key not in known and key not in harmless and not is_empty(value)]
    if unknown:
        names, allowed = ", ".join(quoted(key) for key in unknown[:3]), ", ".join(map(repr, known))
        raise PromptError(f"{where} has {names}, which would be left out; expected {allowed} here: remove or move it")


def is_empty(value: object) -> bool:
    """Whether a value says nothing: null, false, or an empty string, list or object."""
    return value is None or value is False or (isinstance(value, (str, list, tuple, Mapping)) and not value)
