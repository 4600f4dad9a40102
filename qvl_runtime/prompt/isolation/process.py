"""A worker process as its parent sees it: started, asked, killed."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, get_args

from qvl_runtime.errors import ImageError
from qvl_runtime.prompt.decoding import Remark
from qvl_runtime.prompt.isolation.messages import GO, STOP, Channel, Disconnected
from qvl_runtime.prompt.limits import ImageLimits
from qvl_runtime.prompt.preparing import Prepared

_ROOT = Path(__file__).parents[3]
# Pillow's formats take 4 to 17 bytes a pixel, WebP the most; 16-bit and turned images one more copy. The rest is
# Python, with numpy for images of more than 8 bits.
_MEMORY, _MEMORY_PER_PIXEL = 2**28, 24
_MAX_PREVIEW = 2**25  # bytes
_REMARKS: frozenset[Remark] = frozenset(get_args(Remark))
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "LANG", "LC_ALL", "TMPDIR")
_SLOW_NICENESS = 10
_GLANCE_S = 0.02
_START_S = 60.0  # on a machine that is overloaded; 0.1 s otherwise
_LAST_S = 5.0  # the same of its end


class Job(NamedTuple):
    """One image to decode."""

    data: bytes  # the encoded file
    size: int  # S
    limits: ImageLimits
    described: str
    with_preview: bool
    seconds: float  # of decoding


class Worker:
    """A process that decodes images. One thread uses it at a time; `kill` may be called by any."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        paths = list(map(os.path.abspath, sys.path))
        if str(_ROOT) not in paths:  # installed in a way that needs `site`
            paths.append(str(_ROOT))
        code = (
            f"import sys; sys.path[:] = {paths!r}; "
            f"from qvl_runtime.prompt.isolation.worker import main; main({os.getpid()})"
        )
        environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        environment["OPENBLAS_NUM_THREADS"] = "1"  # numpy reserves memory for each thread
        with theirs:
            self._process = subprocess.Popen(
                # -I: nothing of the environment or the current folder; -S: no site, which takes a third of the start
                [_python(), "-I", "-S", "-c", code],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        self._channel = Channel(ours)
        self._cpu_began = 0.0
        self._is_started = self._is_busy = self._is_slow = self._is_killed = False

    @property
    def pid(self) -> int:
        """The id of the process."""
        return int(self._process.pid)

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    @property
    def is_reusable(self) -> bool:
        """Whether the process can take another image: it waits for one, and has its full share of the machine."""
        return not (self._is_busy or self._is_slow or self._is_killed)

    def wait_for_start(self) -> None:
        """Wait until the process is there. Raises `ImageError` if it does not start."""
        if self._is_started:
            return
        self._channel.deadline = time.monotonic() + _START_S
        try:
            self._channel.receive_bytes(1)
        except (Disconnected, TimeoutError) as error:
            how = "does not start" if isinstance(error, TimeoutError) else f"{self.how_it_ended()} as it started"
            raise ImageError(f"the process that decodes images {how}: turn isolate_images off") from None
        self._is_started = True

    def send(self, job: Job) -> None:
        """Send an image. `header`, and then `start` or `refuse` must follow.

        Like the methods below, raises `ImageError`, `Disconnected`, and `TimeoutError` when the job's time is over.
        """
        self._is_busy = True
        self.wait_for_start()
        self._cpu_began = self._cpu_seconds()
        self._channel.deadline = time.monotonic() + job.seconds
        self._channel.send(
            {
                "size": job.size,
                "described": job.described,
                "limits": {**asdict(job.limits), "allow_urls": False, "isolate_images": False},
                "preview": job.with_preview,
                "memory": _MEMORY + _MEMORY_PER_PIXEL * job.limits.max_image_pixels,
                "seconds": job.seconds,
                "bytes": len(job.data),
            },
            job.data,
        )

    def header(self) -> tuple[int, int]:
        """Wait for the width and height of the image."""
        return _size(self._receive())

    def start(self) -> None:
        """Have the pixels decoded."""
        self._channel.send_bytes(GO)

    def refuse(self) -> None:
        """Have the image forgotten."""
        self._channel.send_bytes(STOP)
        self._is_busy = False

    def is_ready(self, patience: float) -> bool:
        """Wait for the next answer until the image has taken so much CPU time, or its time is over."""
        while True:
            now = time.monotonic()
            spent = self._cpu_seconds() - self._cpu_began
            left = (self._channel.deadline or now) - now
            wait = max(0.0, min(left, max(patience - spent, _GLANCE_S)))
            if select.select([self._channel.sock], [], [], wait)[0] or left <= 0:
                return True
            if spent >= patience:
                return False

    def result(self, pixels: memoryview) -> Prepared:
        """Wait for the decoded image, which is written into `pixels`, S x S x 3 bytes."""
        message = self._receive()
        width, height = _size(message)
        remarks, preview = message.get("remarks"), message.get("preview")
        if not isinstance(remarks, list) or not isinstance(preview, int) or not 0 <= preview <= _MAX_PREVIEW:
            raise Disconnected
        self._channel.receive_into(pixels)
        small = bytes(self._channel.receive_bytes(preview)) or None
        self._is_busy = False
        return Prepared(pixels, width, height, frozenset(remark for remark in _REMARKS if remark in remarks), small)

    def slow_down(self) -> None:
        """Let everything else on the machine go first, for good: not every user may take that back."""
        self._is_slow = True
        try:
            os.setpriority(os.PRIO_PROCESS, self.pid, _SLOW_NICENESS)
        except OSError:  # it has ended
            return

    def kill(self) -> None:
        """End the process; the thread that waits for its answer gets `Disconnected`. Does not wait."""
        self._is_killed = True
        self._process.kill()

    def join(self) -> None:
        """Wait for the end of a killed process, which takes some ms; not for one that the system cannot end now."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_LAST_S)

    def close(self) -> None:
        """Kill the process, wait for its end, and close the connection."""
        self.kill()
        self._process.wait()
        self._channel.sock.close()

    def disown(self) -> None:
        """In a forked child: close the connection, and leave the process to the parent."""
        self._process.returncode = 0
        self._channel.sock.close()

    def how_it_ended(self) -> str:
        """Describe the end of a process after `Disconnected`."""
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "sent an invalid answer"
        if code >= 0:
            return f"ended with code {code}"
        try:
            return f"was ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"was ended by signal {-code}"

    def _cpu_seconds(self) -> float:
        """CPU time of the process so far; where only Linux tells it, the time of the clock."""
        try:
            return time.clock_gettime(
                ~self.pid << 3 | 2
            )  # as clock_getcpuclockid(3) names the clock of another process
        except OSError:
            return time.monotonic()

    def _receive(self) -> dict[str, Any]:
        message = self._channel.receive()
        if "error" in message:
            self._is_busy = False
            raise ImageError(str(message["error"]))
        return message


def _size(message: dict[str, Any]) -> tuple[int, int]:
    size = message.get("width"), message.get("height")
    if not all(isinstance(side, int) and 0 < side < 2**31 for side in size):
        raise Disconnected
    return size  # type: ignore[return-value]


def _python() -> str:
    """The interpreter to start, which a program that embeds Python tells multiprocessing, too."""
    from multiprocessing import spawn

    return os.fsdecode(spawn.get_executable())
