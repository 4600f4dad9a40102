"""A llama.cpp server as a peer: a process that reads one command a line and answers each with a line."""

from __future__ import annotations

import subprocess
from typing import IO, cast


class Llama:
    """A llama.cpp that keeps its model loaded and runs one command at a time."""

    def __init__(self, server: str, model: str, threads: int) -> None:
        self.process = subprocess.Popen(
            [server, model, str(threads), "4096"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._in, self._out = cast("IO[str]", self.process.stdin), cast("IO[str]", self.process.stdout)
        if self._out.readline().strip() != "ready":
            raise SystemExit(f"{server} did not load {model}")

    def __call__(self, command: str) -> None:
        """Run a command such as `tg 1` or `pp 512` and wait until it is done.

        Raises:
            SystemExit: The process has ended.
        """
        try:
            self._in.write(command + "\n")
            self._in.flush()
            done = self._out.readline()
        except BrokenPipeError:
            done = ""
        if not done:
            raise SystemExit(f"llama.cpp ended at `{command}` with status {self.process.wait()}")
