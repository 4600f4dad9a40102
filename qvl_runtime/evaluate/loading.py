"""Load the questions of a task, and say what is missing before anything is run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from qvl_runtime.errors import DataError
from qvl_runtime.evaluate.prompts import drawn_examples
from qvl_runtime.evaluate.readers.folder import DataFolder
from qvl_runtime.evaluate.samples import Sample
from qvl_runtime.evaluate.tasks.task import Layout, Task

MAX_NAMED = 3  # missing files that an error names


class Loaded(NamedTuple):
    """The questions of a task."""

    samples: list[Sample]
    total: int  # of the data set, before a limit
    examples: list[Sequence[Sample]]  # of each sample; empty without shots
    files: dict[str, str]  # SHA-256 of each file that was read, by its path in the data folder


def load(
    task: Task, root: Path, limit: int | None = None, shots: int = 0, seed: int = 0, allow_missing: bool = False
) -> Loaded:
    """Read the questions of a task, the first `limit` of them.

    Raises `DataError` that names the expected layouts and the missing files, for an incomplete or broken data folder,
    and, unless `allow_missing`, for images that are not there.
    """
    data = DataFolder(root)
    samples = list(_layout(task, data).read(data))
    if not samples:
        raise DataError(f"{task.name} has no questions in {root}: fetch its files again from {task.source}")
    total, samples = len(samples), samples[:limit]
    examples = _examples(task, data, shots, seed, len(samples)) if shots else []
    if not allow_missing:
        _check_images([*samples, *(one for several in examples for one in several)], task)
    files = {path.relative_to(data.root).as_posix(): _sha256(path) for path in data.read}
    return Loaded(samples, total, examples, files)


def expected(task: Task) -> list[str]:
    """The layouts of a task, one a line."""
    return [_short(layout.files) for layout in task.layouts]


def _layout(task: Task, data: DataFolder) -> Layout:
    """The first layout of a task whose files are all there."""
    missing = {}
    for layout in task.layouts:
        lacking = [name for name in layout.files if not data.path(name).exists()]
        if not lacking:
            return layout
        missing[layout] = lacking
    nearest = min(missing, key=lambda layout: len(missing[layout]) / len(layout.files))
    found = "" if len(missing[nearest]) == len(nearest.files) else f", of which {_short(missing[nearest])} is missing"
    raise DataError(
        f"{data.root} lacks the files of {task.name}; expected {' or else '.join(expected(task))}{found}: "
        f"get them from {task.source}"
    )


def _examples(task: Task, data: DataFolder, shots: int, seed: int, count: int) -> list[Sequence[Sample]]:
    if task.train is None:
        raise DataError(f"{task.name} has no training file to draw examples from: leave out shots")
    lacking = [name for name in task.train.files if not data.path(name).exists()]
    if lacking:
        raise DataError(
            f"{data.path(lacking[0])} does not exist; examples are drawn from it: fetch it, or leave out shots"
        )
    return drawn_examples(list(task.train.read(data)), shots, count, seed)


def _check_images(samples: Sequence[Sample], task: Task) -> None:
    paths = dict.fromkeys(image for sample in samples for image in sample.images if not image.startswith("data:"))
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        named = ", ".join(missing[:MAX_NAMED]) + (", ..." if len(missing) > MAX_NAMED else "")
        raise DataError(
            f"{len(missing)} of the {len(paths)} images of {task.name} are missing: {named}; get them from "
            f"{task.source}, or count their questions as errors with allow_missing"
        )


def _short(files: Sequence[str]) -> str:
    """Names of files, the middle of a long list left out."""
    if len(files) <= 3:
        return " and ".join(files)
    return f"{files[0]}, {files[1]}, ... and {files[-1]} ({len(files)})"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
