"""The worker process: decodes one image after another, until its parent is gone. Imports Pillow, and no torch."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from typing import Any, NoReturn

from qvl_runtime.errors import ImageError, QVLError
from qvl_runtime.prompt.isolation.messages import GO, Channel, Disconnected
from qvl_runtime.prompt.limits import ImageLimits
from qvl_runtime.prompt.preparing import prepare

_PARENT_CHECK_S = 2.0  # where the system does not tell that the parent has ended
_GRACE_S = 1.0  # after the parent's own limit


class NotAdmitted(QVLError):
    """The parent does not want the pixels of this image, now or at all."""


def main(parent: int) -> NoReturn:
    """Serve the parent process at the socket that is standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end is ours
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    restrict("RLIMIT_CORE", 0)
    restrict("RLIMIT_FSIZE", 0)
    import PIL.Image  # noqa: F401 - before the first request, while the parent reads its file

    channel, watched = Channel(socket.socket(fileno=0)), watch(parent)
    try:
        channel.send_bytes(GO)
        while is_wanted(channel.sock, watched, parent):
            serve(channel)
    except Disconnected:
        pass
    sys.exit(0)


def serve(channel: Channel) -> None:
    """Answer one request. Raises `Disconnected` if the parent is gone."""
    request = channel.receive()
    data = bytes(channel.receive_bytes(request["bytes"]))
    restrict("RLIMIT_AS", request["memory"])
    # Whatever the parent does: the default action of this signal ends the process, even in the middle of a decoder.
    signal.setitimer(signal.ITIMER_REAL, request["seconds"] + _GRACE_S)
    try:
        answer(channel, request, data)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def answer(channel: Channel, request: dict[str, Any], data: bytes) -> None:
    """Decode an image, and send it or why it cannot be."""

    def admit(width: int, height: int) -> None:
        channel.send({"width": width, "height": height})
        if channel.receive_bytes(1) != GO:
            raise NotAdmitted

    limits, described = ImageLimits(**request["limits"]), request["described"]
    try:
        image = prepare(data, request["size"], limits, described, admit, request["preview"])
    except NotAdmitted:
        return
    except ImageError as error:
        channel.send({"error": str(error)})
    except MemoryError:
        channel.send({"error": f"{described} needs more memory than it may use to be read: shrink it"})
    else:
        preview = image.preview or b""
        remarks = sorted(image.remarks)
        message = {"width": image.width, "height": image.height, "remarks": remarks, "preview": len(preview)}
        channel.send(message, image.rgb, preview)


def restrict(name: str, limit: int) -> None:
    """Lower a resource limit, where the system has it and lets us."""
    import resource

    try:
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    except (AttributeError, ValueError, OSError):
        return


def watch(parent: int) -> int | None:
    """A file descriptor that becomes readable when the parent ends, where the system has such."""
    try:
        return os.pidfd_open(parent)
    except (AttributeError, OSError):
        return None


def is_wanted(sock: socket.socket, watched: int | None, parent: int) -> bool:
    """Wait for a request; returns False once the parent has ended, even if a child of it holds its end open."""
    sources: list[Any] = [sock] if watched is None else [sock, watched]
    while os.getppid() == parent:
        ready = select.select(sources, [], [], _PARENT_CHECK_S if watched is None else None)[0]
        if sock in ready:
            return True
    return False
