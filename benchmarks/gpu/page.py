"""The suite's rows as a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

TITLES = {
    "bounds": "Computed bounds of decoding (nothing here is measured)",
    "launches": "Launches of a decoder layer in a decode step",
    "compile": "Compiled in parallel",
    "ceiling": "The ceilings: a large copy and a large read",
    "correct": "Kernels against their definitions",
    "graphs": "The same tokens with CUDA graphs and without",
    "goldens": "Whole models against float32",
    "linears": "The linears of a layer against their peers",
    "small": "The small kernels of a layer",
    "int4": "The full-size model in Int4",
    "bf16": "The full-size model in BF16",
    "int4-options": "Int4 with every option: int8 cache, head and vision encoder, embedding on the host",
    "tower": "The vision encoder: the whole, its products, attention and the resampler",
    "variants": "One way against another, in models of eight layers",
    "head": "The head against its alternatives",
    "eager": "The full-size model in plain torch",
    "speed": "Kernels against the ceiling",
    "sanitizer": "compute-sanitizer",
    "targets": "What was to be reached, and what was",
}


def page(setting: Mapping[str, Any], parts: Mapping[str, list[dict[str, Any]]], notes: Iterable[str]) -> str:
    """Setting, notes, then a table for each part whose rows have the same columns."""
    lines = ["# GPU suite", "", *(f"- {name}: {value}" for name, value in setting.items()), ""]
    lines += [f"> {note}" for note in notes]
    for name, rows in parts.items():
        lines += ["", f"## {TITLES.get(name, name)}", ""]
        columns: list[str] = []
        for row in rows:
            if [*row] != columns:
                columns = [*row]
                lines += ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
            lines.append("| " + " | ".join(map(_cell, row.values())) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**NO**"
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
