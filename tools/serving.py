"""`qvl serve` with the shipped nano on a free port, for tools that let other programs ask it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

QVL = [sys.executable, "-c", "from qvl_runtime.cli.app import main; main()"]


@contextmanager
def serving(*options: str) -> Iterator[str]:
    """The URL of a server that is ready, for the time of the body. Raises `RuntimeError` if it does not come up."""
    command = [*QVL, "serve", "--port", "0", "--no-access-log", *options]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        url = ""
        for line in server.stderr or ():
            if line.startswith("listening at "):
                url = line.removeprefix("listening at ").partition(",")[0]
            if line.startswith("ready"):
                break
        if not url:
            raise RuntimeError(f"qvl serve ended with exit code {server.wait()}")
        yield url
    finally:
        server.terminate()
        server.wait()
