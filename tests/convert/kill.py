"""A conversion in its own process, for a test that kills it."""

from __future__ import annotations

from multiprocessing.synchronize import Event
from pathlib import Path

import torch

from qvl_runtime.convert import shard_writer
from qvl_runtime.convert.convert import convert

SHARD = 20_000  # bytes a file, so that there are some dozens of them


def converting(source: Path, destination: Path, started: Event | None = None) -> None:
    torch.set_num_threads(1)
    shard_writer.SHARD = SHARD
    if started is not None:
        started.set()
    convert(source, destination)
