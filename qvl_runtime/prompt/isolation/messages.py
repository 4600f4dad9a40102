"""Messages between a process and its worker: a JSON object, then bytes. Nothing in them is executed or unpickled.

request    {"size", "described", "limits", "preview", "memory", "seconds", "bytes"}, then the image file
header     {"width", "height"}, once the worker has read the header; answered by GO or STOP, one byte
result     {"width", "height", "remarks", "preview"}, then S x S x 3 bytes of pixels, and the preview; or {"error"}
"""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

GO, STOP = b"\1", b"\0"
_LENGTH = struct.Struct("!I")
_MAX_OBJECT = 2**16  # bytes


class Disconnected(Exception):
    """The other side is gone, or sent what is no message."""


class Channel:
    """One end of the connection. All methods raise `Disconnected`, and `TimeoutError` at the deadline, if one is set.

    deadline: of `time.monotonic`.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.deadline: float | None = None

    def send(self, message: dict[str, Any], *payloads: bytes | bytearray | memoryview) -> None:
        """Send an object and what belongs to it."""
        text = json.dumps(message).encode("ascii")
        self.send_bytes(_LENGTH.pack(len(text)) + text)
        for payload in payloads:
            self.send_bytes(payload)

    def send_bytes(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes."""
        try:
            self._limit_time()
            self.sock.sendall(data)
        except TimeoutError:
            raise
        except OSError as error:
            raise Disconnected from error

    def receive(self) -> dict[str, Any]:
        """Receive an object."""
        (length,) = _LENGTH.unpack(self.receive_bytes(_LENGTH.size))
        if length > _MAX_OBJECT:
            raise Disconnected
        try:
            message = json.loads(self.receive_bytes(length))
        except (ValueError, RecursionError) as error:
            raise Disconnected from error
        if not isinstance(message, dict):
            raise Disconnected
        return message

    def receive_bytes(self, length: int) -> bytearray:
        """Receive as many bytes."""
        data = bytearray(length)
        self.receive_into(memoryview(data))
        return data

    def receive_into(self, buffer: memoryview) -> None:
        """Fill a writable buffer of bytes."""
        received = 0
        while received < len(buffer):
            try:
                self._limit_time()
                count = self.sock.recv_into(buffer[received:])
            except TimeoutError:
                raise
            except OSError as error:
                raise Disconnected from error
            if not count:
                raise Disconnected
            received += count

    def _limit_time(self) -> None:
        seconds = None if self.deadline is None else self.deadline - time.monotonic()
        if seconds is not None and seconds <= 0:
            raise TimeoutError
        self.sock.settimeout(seconds)
