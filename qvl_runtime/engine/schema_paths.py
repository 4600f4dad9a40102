"""Where in a JSON Schema a keyword stands, so that an error can say which one is not supported, and where."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

# Keywords whose value is a schema, a list of schemas, or an object of schemas. Other values may hold the same words as
# plain data: {"const": {"not": 1}}.
_SCHEMAS: tuple[str, ...] = (
    *("additionalItems", "additionalProperties", "allOf", "anyOf", "contains", "contentSchema", "else", "if", "items"),
    *("not", "oneOf", "prefixItems", "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties"),
)
_NAMED_SCHEMAS: tuple[str, ...] = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")


def subschemas(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema within a schema, itself included, with its path: "#/properties/a"."""
    waiting: list[tuple[str, Any]] = [("#", schema)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, list):
            waiting += [(f"{path}/{i}", entry) for i, entry in enumerate(value)]
        if not isinstance(value, dict):
            continue
        yield path, value
        waiting += [(f"{path}/{key}", value[key]) for key in _SCHEMAS if key in value]
        for key in _NAMED_SCHEMAS:
            if isinstance(value.get(key), dict):
                waiting += [(f"{path}/{key}/{_escaped(name)}", entry) for name, entry in value[key].items()]


def paths_of(schema: Any, keywords: Iterable[str]) -> list[str]:
    """The paths of these keywords: "#/properties/a/not"."""
    wanted = set(keywords)
    return sorted(f"{path}/{key}" for path, value in subschemas(schema) for key in value if key in wanted)


def remote_references(schema: Any) -> list[str]:
    """References to other documents, which are never fetched: "#/properties/a/$ref 'https://...'"."""
    return [
        f"{path}/$ref {reference[:80]!r}"
        for path, value in subschemas(schema)
        if isinstance(reference := value.get("$ref"), str) and not reference.startswith("#")
    ]


def _escaped(name: str) -> str:
    """A key within a JSON pointer (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")
