"""Options for how tokens are sampled, and for what an answer follows: a JSON Schema, a grammar, boxes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvl_runtime.errors import ConstraintError
from qvl_runtime.reading.regular_files import read_regular
from qvl_runtime.reading.text import decode

if TYPE_CHECKING:
    from qvl_runtime.schedule.api import SamplingParams

SAMPLING, PANEL = "Sampling", "Form of the answer"  # help panels
MAX_FILE = 1 << 20  # bytes; what is too long for a grammar is refused with its own message


@dataclass(frozen=True)
class GuideOptions:
    """What the answer follows, one of these: fields of `SamplingParams`, with files for long ones."""

    boxes: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Hold boxes to their format: force, nothing but boxes, or allow, text too.",
            rich_help_panel=PANEL,
        ),
    ] = None
    json_schema: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Answer in JSON that follows this JSON Schema.", rich_help_panel=PANEL),
    ] = None
    json_object: Annotated[
        bool, typer.Option("--json-object", help="Answer in a JSON object.", rich_help_panel=PANEL)
    ] = False
    regex: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="Answer in text that matches as a whole.", rich_help_panel=PANEL),
    ] = None
    choice: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Answer with one of these; repeat for several.", rich_help_panel=PANEL),
    ] = None
    grammar: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Answer by this grammar, in llguidance's Lark.", rich_help_panel=PANEL),
    ] = None

    def guides(self) -> dict[str, Any]:
        """The fields of `SamplingParams`, with the content of files. Raises `ConstraintError` for unreadable ones."""
        from qvl_runtime.cli.streams import argument_text

        return {
            "boxes": self.boxes,
            "json_schema": None if self.json_schema is None else _content(self.json_schema, "--json-schema"),
            "json_object": self.json_object,
            "regex": None if self.regex is None else argument_text(self.regex, "--regex"),
            "choice": tuple(argument_text(text, "--choice") for text in self.choice) if self.choice else None,
            "grammar": None if self.grammar is None else _content(self.grammar, "--grammar"),
        }


@dataclass(frozen=True)
class SamplingOptions(GuideOptions):
    """How tokens are sampled and what answers follow; what is not set takes the checkpoint's defaults."""

    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Maximum number of tokens to generate.", rich_help_panel=SAMPLING)
    ] = None
    min_tokens: Annotated[
        int,
        typer.Option(metavar="N", help="Do not end an answer before it has N tokens.", rich_help_panel=SAMPLING),
    ] = 0
    temperature: Annotated[
        float | None,
        typer.Option(metavar="X", help="Sampling temperature; 0 = greedy.", rich_help_panel=SAMPLING),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Sample from the most likely tokens with total probability X.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(metavar="N", help="Sample from the N most likely tokens; 0 = all.", rich_help_panel=SAMPLING),
    ] = None
    presence_penalty: Annotated[
        float,
        typer.Option(
            metavar="X", help="Subtract X, -2 to 2, from the logits of tokens in the answer.", rich_help_panel=SAMPLING
        ),
    ] = 0.0
    frequency_penalty: Annotated[
        float,
        typer.Option(metavar="X", help="The same for each time that it has the token.", rich_help_panel=SAMPLING),
    ] = 0.0
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Random seed: the same seed gives the same answer.", rich_help_panel=SAMPLING),
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Stop before this text; repeat for several.", rich_help_panel=SAMPLING),
    ] = None

    def params(self) -> SamplingParams:
        """The sampling parameters, validated before a model is loaded. Raises `SamplingError`."""
        from qvl_runtime.cli.streams import argument_text
        from qvl_runtime.schedule.api import SamplingParams

        return SamplingParams(
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            stop=tuple(argument_text(text, "--stop") for text in self.stop or ()),
            **self.guides(),
        )


def _content(name: str, option: str) -> str:
    try:
        return decode(read_regular(Path(name), ConstraintError, MAX_FILE), name, ConstraintError)
    except FileNotFoundError:
        raise ConstraintError(f"{option} is {name!r}, which does not exist; expected a file") from None
