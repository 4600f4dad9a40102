"""Terminal output: streamed text, notes, progress bars and tables.

Results go to standard output, and nothing else does; notes, progress, speed and errors go to standard error.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from qvl_runtime.cli.flags import as_flags

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from qvl_runtime.schedule.api import Completion, StreamPiece

# Exit codes. The last two are what shells report for a program that SIGINT or SIGPIPE killed.
BUG, USER_ERROR, FAILED_RECORDS, INTERRUPTED, BROKEN_PIPE = 1, 2, 3, 130, 141

# Control characters except tab and newline, shown as symbols: an answer must not be able to control the terminal.
_CONTROL_SYMBOLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}
_CONTROL_SYMBOLS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)

_flags: dict[str, str] = {}  # of the command that runs


class Answer(NamedTuple):
    """What arrived of one streamed answer."""

    text: str
    completion: Completion | None  # None if Ctrl-C stopped it early


def printable(text: str) -> str:
    """The text with each control character replaced by a visible symbol."""
    return text.translate(_CONTROL_SYMBOLS)


def say(line: str) -> None:
    """Print one line to standard error."""
    print(" ".join(printable(line).split()), file=sys.stderr, flush=True)


def use_flags(flags: Mapping[str, str]) -> None:
    """Set the options that take the place of parameters in errors and warnings: those of the command that runs."""
    _flags.clear()
    _flags.update(flags)


def say_error(error: BaseException | str) -> None:
    """Print `error: …` to standard error, on one line even if the message has line breaks."""
    if isinstance(error, OSError) and error.strerror:  # without its number and quotes
        name = error.filename
        name = os.fsdecode(name) if isinstance(name, (str, bytes)) else name
        error = error.strerror if name is None else f"{name}: {error.strerror}"
    say(f"error: {as_flags(str(error), _flags)}")


def print_json(content: object, indent: int | None = None) -> None:
    """Print a JSON object; a character that standard output's encoding may lack is escaped, so that none is lost."""
    is_unicode = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    print(json.dumps(content, ensure_ascii=not is_unicode, indent=indent))


def say_warning(message: object) -> None:
    """Print `warning: …` to standard error, on one line."""
    say(f"warning: {as_flags(str(message), _flags)}")


class LogLines(logging.Handler):
    """Prints the first lines of the library's log records to standard error, as `warning: …`."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the first line of a record; a traceback may follow it."""
        first_line = record.getMessage().partition("\n")[0]
        say(f"{record.levelname.lower()}: {as_flags(first_line, _flags)}")


@contextmanager
def working(label: str) -> Iterator[None]:
    """Show a spinner with a label while the body runs, if standard error is a terminal; it is erased afterwards."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(label):
        yield


@contextmanager
def progress_bar(
    label: str, total: int | None, done: int = 0, shown: bool = True, in_bytes: bool = False
) -> Iterator[Callable[[int], None]]:
    """Show a progress bar, if standard error is a terminal; yields a function to call with the number done so far.

    total: None if it is not known.
    """
    if not shown or not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    counted = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), counted, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total, completed=done)
        yield lambda count: progress.update(task, completed=count)


def print_table(table: Table, console: Console | None = None) -> None:
    """Print a table to standard output without cutting words or numbers, as rich alone would ("11.0…").

    A table wider than the terminal wraps its cells between words, widest column first. If standard output is not a
    terminal, the table is as wide as it needs.
    """
    from rich.console import Console
    from rich.measure import Measurement

    unlimited = Console(width=10_000)

    def measure(item: Any) -> Measurement:
        return Measurement.get(unlimited, unlimited.options, item)

    spans = [[measure(cell) for cell in (column.header, *column.cells)] for column in table.columns]
    limits = [(max(span.minimum for span in cells), max(span.maximum for span in cells)) for cells in spans]
    natural = measure(table).maximum
    spacing = natural - sum(high for _, high in limits)
    console = console or Console(width=None if sys.stdout.isatty() else natural)
    console.width = max(console.width, spacing + sum(low for low, _ in limits))  # a narrower terminal wraps the lines
    widths, cap = [high for _, high in limits], natural
    while spacing + sum(widths) > console.width:
        cap -= 1
        widths = [max(low, min(high, cap)) for low, high in limits]
    for column, width in zip(table.columns, widths, strict=True):
        column.width = width
    console.print(table)


def receive(pieces: Iterator[StreamPiece], echo: bool) -> Answer:
    """Collect a stream; with `echo`, also write it to standard output as it arrives.

    Ctrl-C stops the answer but not the program: the text so far is kept, and closing the stream frees the request's
    resources in the engine.
    """
    show = printable if sys.stdout.isatty() else str
    texts: list[str] = []
    completion = None
    try:
        for piece in pieces:
            texts.append(piece.text)
            completion = piece.completion or completion
            if echo:
                print(show(piece.text), end="", flush=True)
    except KeyboardInterrupt:
        completion = None
    finally:
        if isinstance(pieces, Generator):
            pieces.close()
        if echo and texts:
            print(flush=True)
    return Answer("".join(texts), completion)


def speed_line(completion: Completion) -> str:
    """Number and speed of the prompt and generated tokens, on one line."""
    usage, timings = completion.usage, completion.timings
    parts = [
        f"{usage.prompt_tokens} tokens in at {rate(timings.prefill_tokens_per_s)}",
        f"{usage.completion_tokens} out at {rate(timings.decode_tokens_per_s)}",
        f"first after {timings.ttft_s:.2f} s",
    ]
    if usage.images:
        parts.append(f"images {timings.image_s + timings.vision_s:.2f} s")
    if completion.finish_reason == "length":
        parts.append("cut off at the token limit (--max-tokens)")
    return ", ".join(parts)


def rate(tokens_per_s: float) -> str:
    """Tokens per second as text, with one decimal below 100."""
    if tokens_per_s <= 0:
        return "–"
    return f"{tokens_per_s:.1f} tok/s" if tokens_per_s < 100 else f"{tokens_per_s:,.0f} tok/s"


def size(count: int) -> str:
    """A number of bytes in binary units, to about three digits."""
    amount, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while amount >= 1024 and len(units) > 1:
        amount /= 1024
        units.pop(0)
    return f"{amount:,.0f} {units[0]}" if units[0] == "B" or amount >= 100 else f"{amount:.1f} {units[0]}"


def box_lines(completion: Completion) -> list[str]:
    """One line per box: its label and its corners on the 0-1000 grid."""
    return [
        f"{box.label or 'box'}: ({box.x1}, {box.y1}) to ({box.x2}, {box.y2}) of 1000"
        + (f", image {box.image_index + 1}" if completion.usage.images > 1 and box.image_index is not None else "")
        for box in completion.boxes
    ]
