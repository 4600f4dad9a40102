"""The requests of a file as rows for many engines: numbered, checked for double ids, near others with their picture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple

from qvl_runtime.cluster.affinity import first_picture
from qvl_runtime.engine.records import parse_record, record_id
from qvl_runtime.errors import PromptError, QVLError, quoted
from qvl_runtime.reading.lines import MAX_LINE, Line, read_lines

WINDOW_ROWS = 50_000  # rows that are sorted together, and in memory
WINDOW_BYTES = 256 * 2**20
CHUNK_ROWS = 8  # rows that are sent to an engine at once, unless they share a picture
LARGEST_CHUNK = 32
_READ = 2**20  # bytes


class Row(NamedTuple):
    """One request."""

    position: int  # from 0, of lines that are not blank
    line: Line


class Survey(NamedTuple):
    """What a file of requests holds."""

    rows: int
    digest: str  # SHA-256 of its bytes


def survey(path: Path, limit: int = MAX_LINE) -> Survey:
    """Read a file once. Raises `PromptError` if two rows have the same id, or if there is none at all, and `OSError`.

    Rows without an id, and those that are not valid, are known by their index.
    """
    seen: dict[bytes, int] = {}  # digests of ids, and the line of each
    digest, rows = hashlib.sha256(), 0
    with path.open("rb") as file:

        def read() -> bytes:
            data = file.read(_READ)
            digest.update(data)
            return data

        for line in read_lines(read, str(path), limit):
            if line is None:
                continue
            rows += 1
            if (name := _id_of(line, path, limit)) is None:
                continue
            key = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=12).digest()
            if (first := seen.setdefault(key, line.number)) != line.number:
                raise PromptError(
                    f"lines {first} and {line.number} of {path} have the same id, {quoted(name)}: give each its own"
                )
    if not rows:
        raise PromptError(f"{path} holds no request; expected one JSON object on each line")
    return Survey(rows, digest.hexdigest())


def chunks(path: Path, done: Container[int], limit: int = MAX_LINE) -> Iterator[list[Row]]:
    """The rows whose index is not in `done`, a few at a time: those about the same picture one after another.

    Rows are sorted by picture within windows of `WINDOW_ROWS` rows or `WINDOW_BYTES`, so that memory is bounded. A
    chunk ends where the picture changes, if it can.
    """
    for window in _windows(path, done, limit):
        keyed = sorted(((_picture(row.line, path, limit), row) for row in window), key=lambda pair: pair[0])
        chunk: list[Row] = []
        before = ""
        for picture, row in keyed:
            full = len(chunk) >= CHUNK_ROWS and (not picture or picture != before)
            if full or len(chunk) >= LARGEST_CHUNK:
                yield chunk
                chunk = []
            chunk.append(row)
            before = picture
        if chunk:
            yield chunk


def _windows(path: Path, done: Container[int], limit: int) -> Iterator[list[Row]]:
    window: list[Row] = []
    size = 0
    with path.open("rb") as file:
        lines = (line for line in read_lines(lambda: file.read(_READ), str(path), limit) if line is not None)
        for index, line in enumerate(lines):
            if index in done:
                continue
            window.append(Row(index, line))
            size += len(line.data)
            if len(window) >= WINDOW_ROWS or size >= WINDOW_BYTES:
                yield window
                window, size = [], 0
    if window:
        yield window


def _id_of(line: Line, path: Path, limit: int) -> str | None:
    try:
        value = record_id(parse_record(line, str(path), limit))
    except QVLError:
        return None
    return None if value is None else json.dumps(value, sort_keys=True)


def _picture(line: Line, path: Path, limit: int) -> str:
    """What to sort a row by: its first picture, as it is named; nothing without one."""
    try:
        url = first_picture(parse_record(line, str(path), limit))
    except QVLError:
        return ""
    if url is None or len(url) <= 512:
        return url or ""
    return hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
