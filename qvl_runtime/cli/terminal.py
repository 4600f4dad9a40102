"""What a person at a terminal sees: text as it comes, one line about speed, and the answer as JSON for programs.

The answer goes to standard output and nothing else does; notes, speed and errors go to standard error.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qvl_runtime.errors import ImageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from qvl_runtime.prompt.boxes import Box
    from qvl_runtime.schedule.api import Completion, StreamPiece

INTERRUPTED = 130  # the exit code that shells report for a program that SIGINT ended
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

# Control characters but tab and newline, shown by their images: an answer must not be able to drive the terminal.
_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}
_CONTROL_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


class Answer(NamedTuple):
    """What was received of one streamed answer."""

    text: str
    completion: Completion | None  # None: stopped by Ctrl-C before the end


def printable(text: str) -> str:
    """The text with control characters replaced, one for one, by characters that only look like them."""
    return text.translate(_CONTROL_PICTURES)


def say(line: str) -> None:
    """One line to standard error."""
    print(" ".join(printable(line).split()), file=sys.stderr, flush=True)


def say_error(error: BaseException | str) -> None:
    """`error: …` on one line of standard error, whatever line breaks the message has."""
    say(f"error: {error}")


class LogLines(logging.Handler):
    """Shows what the library logs as `warning: …` on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.levelname.lower()}: {record.getMessage()}")


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner beside `what` while the body runs, where standard error is a terminal; gone without trace after it."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


@contextmanager
def progress_bar(
    what: str, total: int, done: int = 0, shown: bool = True, in_bytes: bool = False
) -> Iterator[Callable[[int], None]]:
    """A bar beside `what`, where standard error is a terminal; the body calls what it gets with how many are done."""
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
        task = progress.add_task(what, total=total, completed=done)
        yield lambda count: progress.update(task, completed=count)


def print_table(table: Table, console: Console | None = None) -> None:
    """A table on standard output, every word and number of it whole; rich alone would cut them ("11.0…").

    Where it is wider than the terminal, cells break between words, in the column first that can spare the most; where
    standard output is no terminal, it is as wide as it wants.
    """
    from rich.console import Console
    from rich.measure import Measurement

    boundless = Console(width=10_000)
    spans = [
        [Measurement.get(boundless, boundless.options, text) for text in (column.header, *column.cells)]
        for column in table.columns
    ]
    widths = [max(span.maximum for span in texts) for texts in spans]
    spare = [width - max(span.minimum for span in texts) for width, texts in zip(widths, spans, strict=True)]
    whole = Measurement.get(boundless, boundless.options, table).maximum
    console = console or Console(width=None if sys.stdout.isatty() else whole)
    console.width = max(console.width, whole - sum(spare))  # a terminal that is narrower still breaks the lines itself
    for _ in range(min(whole - console.width, sum(spare))):
        most = spare.index(max(spare))
        widths[most] -= 1
        spare[most] -= 1
    for column, width in zip(table.columns, widths, strict=True):
        column.width = width
    console.print(table)


def receive(pieces: Iterator[StreamPiece], echo: bool) -> Answer:
    """Collect a stream, writing it to standard output as it comes if `echo`.

    Ctrl-C ends the answer but not the program: what has come is kept and the stream is closed, which frees what the
    engine holds for it.
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
    """How many tokens went in and out, and how fast."""
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
    """Tokens per second, with a digit behind the point where it says something."""
    if tokens_per_s <= 0:
        return "–"
    return f"{tokens_per_s:.1f} tok/s" if tokens_per_s < 100 else f"{tokens_per_s:,.0f} tok/s"


def size(count: int) -> str:
    """Bytes in binary units, to three digits or so."""
    amount, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while amount >= 1024 and len(units) > 1:
        amount /= 1024
        units.pop(0)
    return f"{amount:,.0f} {units[0]}" if units[0] == "B" or amount >= 100 else f"{amount:.1f} {units[0]}"


def box_lines(completion: Completion) -> list[str]:
    """One line a box: its label and its corners in per mille of the image's sides."""
    return [
        f"{box.label or 'box'}: ({box.x1}, {box.y1}) to ({box.x2}, {box.y2}) of 1000"
        + (f", image {box.image_index + 1}" if completion.usage.images > 1 and box.image_index is not None else "")
        for box in completion.boxes
    ]


def answer_json(answer: Answer, drawn: Path | None) -> str:
    """The answer as one JSON object on one line; a stopped one has its text and nothing that only the end knows."""
    fields: dict[str, Any] = {"text": answer.text, "finish_reason": "interrupted"}
    if (completion := answer.completion) is not None:
        known = completion.timings
        derived = ("ttft_s", "prefill_tokens_per_s", "decode_tokens_per_s")
        timings = asdict(known) | {name: getattr(known, name) for name in derived}
        fields |= {
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "boxes": [_box_fields(box, completion) for box in completion.boxes],
            "token_ids": list(completion.token_ids),
            "usage": asdict(completion.usage) | {"total_tokens": completion.usage.total_tokens},
            "timings": {name: round(seconds, 6) for name, seconds in timings.items()},
            "drawn": None if drawn is None else str(drawn),
        }
    return json.dumps(fields, ensure_ascii=False)


def _box_fields(box: Box, completion: Completion) -> dict[str, Any]:
    """The box as it is, and its corners in pixels of the image that it would be drawn on."""
    image = completion.images[-1 if box.image_index is None else box.image_index] if completion.images else None
    return asdict(box) | {"pixels": None if image is None else box.pixels(image.width, image.height)}


def drawable(path: Path) -> Path:
    """`path`, if an image can be written there; asked before the model is loaded, not after the answer."""
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise ImageError(f"cannot draw to {path}: its name must end in {', '.join(PICTURE_SUFFIXES)}")
    if not path.parent.is_dir():
        raise ImageError(f"cannot draw to {path}: the folder {path.parent} does not exist; make it first")
    return path


def save_drawing(completion: Completion, path: Path) -> Path | None:
    """Write the image with the answer's boxes drawn; None, with a note, where the answer has none."""
    if not completion.boxes:
        say(f"note: the answer has no box, so {path} is not written; ask for one: 'Box the dog', '框出图中的狗'")
        return None
    completion.draw().save(path)
    return path


def content(text: str, images: Sequence[str]) -> list[dict[str, str]]:
    """The content of a chat message: images first, then the text."""
    return [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": text}]
