"""A connection that a client cannot hold by doing nothing: neither before its request nor while it is answered.

uvicorn waits without end for the head of a request, and for a client to read; the time for a body is the endpoint's.
"""

from __future__ import annotations

import asyncio
import logging

from uvicorn.protocols.http.h11_impl import H11Protocol

_log = logging.getLogger("qvl_runtime")


class Connection(H11Protocol):
    """uvicorn's protocol in pure Python, whose limit on the size of a head the other one does not have, with timers."""

    head_s = 20.0  # from the connection, or the first byte of a further request, until its headers are complete
    unread_s = 60.0  # for a client to read some of what the socket and the buffer, 64 KiB, hold

    _head: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._time_head()

    def data_received(self, data: bytes) -> None:
        """Take bytes of a request."""
        super().data_received(data)
        self._time_head()

    def pause_writing(self) -> None:
        """Wait for the client to read."""
        super().pause_writing()
        self._unread = self.loop.call_later(self.unread_s, self._give_up)

    def resume_writing(self) -> None:
        """Write again."""
        super().resume_writing()
        self._stop_unread()

    def connection_lost(self, exc: Exception | None) -> None:
        """End; a request that is being answered is canceled."""
        self._stop_head()
        self._stop_unread()
        super().connection_lost(exc)

    def _time_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_head()
        elif self._head is None:
            self._head = self.loop.call_later(self.head_s, self._close)

    def _close(self) -> None:
        self._head = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def _give_up(self) -> None:
        self._unread = None
        _log.warning("a client has read nothing for %g s: its connection is closed", self.unread_s)
        self.transport.abort()

    def _stop_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _stop_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
