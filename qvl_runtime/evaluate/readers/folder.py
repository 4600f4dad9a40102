"""The folder of the data sets: its files, read with errors that name file and line, and its images."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qvl_runtime.errors import DataError, quoted
from qvl_runtime.reading.json_text import parse_json
from qvl_runtime.reading.regular_files import read_regular
from qvl_runtime.reading.text import decode

LARGEST_FILE = 8 << 30  # bytes: a TSV with the images of a whole data set
_WAY_OUT = "fetch the file again"


class DataFolder:
    """What the original's scripts call `data`: a folder of a data set each, and images where their files say."""

    def __init__(self, root: Path) -> None:
        """Raises `DataError` if there is no such folder."""
        if not root.is_dir():
            raise DataError(f"the data folder {root} does not exist: give the folder that holds the data sets")
        self.root = root
        self.read: list[Path] = []  # files that were read, for the hash of a run's settings

    def path(self, name: str) -> Path:
        """The path of a file of the data folder."""
        return self.root / name

    def text(self, name: str) -> str:
        """The text of a file. Raises `DataError` for one that is missing or not UTF-8."""
        path = self.path(name)
        try:
            data = read_regular(path, DataError, LARGEST_FILE)
        except FileNotFoundError:
            raise DataError(f"{path} does not exist") from None
        self.read.append(path)
        return decode(data, str(path), DataError, way_out=_WAY_OUT)

    def json(self, name: str, kind: type = dict) -> Any:
        """The JSON object of a file, or its list with `kind=list`."""
        path = self.path(name)
        content = parse_json(self.text(name), str(path), DataError, _WAY_OUT)
        if not isinstance(content, kind):
            expected = "an object" if kind is dict else "a list"
            raise DataError(f"{path} holds a JSON {type(content).__name__}; expected {expected}")
        return content

    def lines(self, name: str) -> Iterator[Record]:
        """The JSON objects of a file of lines; blank lines do not count."""
        path = self.path(name)
        for number, line in enumerate(self.text(name).split("\n"), 1):
            if line.strip():
                where = f"{path} line {number}"
                yield Record(parse_json(line, where, DataError, _WAY_OUT), where)

    def records(self, name: str, key: str | None = None) -> Iterator[Record]:
        """The objects of a JSON list, or of the list under `key` of a JSON object."""
        path = self.path(name)
        content: Any = self.json(name, list if key is None else dict)
        if key is not None:
            content = Record(content, str(path)).get(key, list)
        for number, entry in enumerate(content):
            yield Record(entry, f"{path} entry {number}")

    def table(self, name: str) -> Iterator[Record]:
        """The rows of a file of tab-separated values whose first line has the names of the columns."""
        path = self.path(name)
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # images in base64 are longer than its usual limit
        rows = csv.DictReader(self.text(name).splitlines(keepends=True), delimiter="\t")
        for number, row in enumerate(rows, 1):
            if None in row or None in row.values():
                raise DataError(f"{path} row {number} has not as many columns as its first line: {_WAY_OUT}")
            yield Record(row, f"{path} row {number}")

    def image(self, name: str, *folders: str) -> str:
        """The path of an image as a data set's file writes it.

        The original ran one folder above its `data`, so that most of its files say `data/...`. A name is looked for
        there, in the data folder, and in `folders` of it; the first of these is returned where there is no such file.
        """
        if Path(name).is_absolute():
            return name
        plain = name.removeprefix("data/")
        tried = [*(self.root / folder / name for folder in folders), self.root / plain, self.root.parent / name]
        return str(next((path for path in tried if path.exists()), tried[0]))


class Record:
    """An object of a data set's file; what it lacks is an error that names the file and its line."""

    def __init__(self, values: object, where: str) -> None:
        """Raises `DataError` if `values` is no object."""
        if not isinstance(values, Mapping):
            raise DataError(f"{where} is {quoted(values)}; expected an object")
        self.values, self.where = values, where

    def get(self, name: str, *kinds: type) -> Any:
        """A value of one of these types. Raises `DataError` where it is missing or of another type."""
        value = self.values.get(name)
        if value is None or not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            found = f"has {name} {quoted(value)}" if name in self.values else f"has no {name!r}"
            expected = " or ".join(sorted(kind.__name__ for kind in kinds))
            raise DataError(f"{self.where} {found}; expected one of type {expected}: {_WAY_OUT}")
        return value

    def text(self, name: str) -> str:
        """A string."""
        return str(self.get(name, str))

    def id(self, name: str) -> str | int:
        """A string or whole number, which a submission repeats as it is."""
        value: str | int = self.get(name, str, int)
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings, or one string."""
        value = self.get(name, str, list)
        values = [value] if isinstance(value, str) else value
        if not all(isinstance(entry, str) for entry in values):
            raise DataError(f"{self.where} has {name} {quoted(value)}; expected a list of strings: {_WAY_OUT}")
        return tuple(values)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of `count` numbers."""
        value = self.get(name, list)
        if len(value) != count or not all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in value):
            raise DataError(f"{self.where} has {name} {quoted(value)}; expected {count} numbers: {_WAY_OUT}")
        return tuple(float(n) for n in value)
