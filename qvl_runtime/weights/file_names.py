"""Names of files that a stranger wrote into an index or a manifest, before a path is made of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from qvl_runtime.errors import CheckpointError, quoted

MAX_NAME = 255  # bytes, of a file on the usual disks
WEIGHTS = ("*.safetensors", "*.bin")
INDEXES = ("*.index.json",)
SMALL_FILES = ("*.json", "*.tiktoken")
_SEPARATORS = "/\\:"  # the last two mean something on Windows alone
_RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(10))}  # on Windows


def name_fault(name: object) -> str:
    """Why a value is not the plain name of a file; empty if it is.

    A plain name has no separator, is neither `.` nor `..`, and is one on every system, so that a folder joined with it
    is a file in that folder.
    """
    if not isinstance(name, str) or not name:
        return "is not a name"
    if any(separator in name for separator in _SEPARATORS):
        return "names a folder or a disk"
    if not name.isprintable() or name != name.strip() or name.strip(".") == "" or name.endswith("."):
        return "is not a plain name"
    if len(name.encode("utf-8", "surrogatepass")) > MAX_NAME:
        return f"is longer than {MAX_NAME} bytes"
    return "is reserved on Windows" if name.partition(".")[0].upper() in _RESERVED else ""


def check_names(names: Iterable[object], patterns: Sequence[str], where: str) -> None:
    """Raise `CheckpointError` unless all are plain names that end as `patterns`."""
    for name in names:
        fault = name_fault(name)
        if not fault and not any(fnmatchcase(str(name), pattern) for pattern in patterns):
            fault = "is of another kind"
        if fault:
            raise CheckpointError(
                f"{where} has {quoted(name)}, which {fault}; expected plain names of files, {' or '.join(patterns)}, "
                "so rename the file, or take the folder from its source again"
            )


def check_distinct(names: Iterable[str], where: str) -> None:
    """Raise `CheckpointError` for names that are one file, on systems that tell no case apart too."""
    seen: set[str] = set()
    for name in names:
        if name.casefold() in seen:
            raise CheckpointError(f"{where} has two files named {quoted(name)}: convert the source again")
        seen.add(name.casefold())


def check_inside(folder: Path, name: str) -> Path:
    """The path of a file in `folder`. Raises `CheckpointError` for a link that leads out of it.

    The cache of a hub is such a folder: its files are links to `blobs`, two folders above.
    """
    path = folder / name
    try:
        real, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be followed ({error}): fetch it again") from None
    blobs = root.parent.parent / "blobs"
    if real.parent == root or (root.parent.name == "snapshots" and real.parent == blobs):
        return path
    raise CheckpointError(f"{path} is a link that leads out of its folder: put a copy in its place")
