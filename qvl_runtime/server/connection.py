"""A connection that a client cannot hold by doing nothing: neither before its request nor while it is answered.

uvicorn waits without end for the head of a request, for the rest of a body that was answered early, and for a client to
read. The time for any other body is the endpoint's.
"""

from __future__ import annotations

import asyncio
import logging

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_log = logging.getLogger("qvl_runtime")


class Connection(H11Protocol):
    """uvicorn's protocol in pure Python, whose limit on the size of a head the other one does not have, with timers."""

    head_s = 20.0  # from the connection, or the first byte of a further request, until its headers are complete
    unread_s = 60.0  # for a client to read anything, while something waits to be sent

    _sending: asyncio.TimerHandle | None = None  # ends a client that does not send what it has begun
    _reading: asyncio.TimerHandle | None = None  # ends one that does not read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # what the socket does not take at once is known to wait
        self._time_sending()

    def data_received(self, data: bytes) -> None:
        """Take bytes of a request."""
        super().data_received(data)
        self._time_sending()

    def pause_writing(self) -> None:
        """Wait for the client to read; nothing is added to what is to be sent meanwhile."""
        super().pause_writing()
        self._time_reading(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """Write again."""
        super().resume_writing()
        self._stop_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """End; a request that is being answered is canceled."""
        self._stop_sending()
        self._stop_reading()
        super().connection_lost(exc)

    def _time_sending(self) -> None:
        is_idle = self.conn.their_state is h11.IDLE
        if self.cycle is not None and not self.cycle.response_complete:  # a request is being answered
            self._stop_sending()
        elif self.cycle is not None and is_idle and not self.conn.trailing_data[0]:  # between two requests
            self._stop_sending()
            if self.timeout_keep_alive_task is None:  # the rest of a body has come, at which uvicorn stops that timer
                wait, end = self.timeout_keep_alive, self.timeout_keep_alive_handler
                self.timeout_keep_alive_task = self.loop.call_later(wait, end)
        elif self._sending is None:
            seconds = self.head_s if is_idle else float(self.timeout_keep_alive)
            self._sending = self.loop.call_later(seconds, self.transport.close)

    def _time_reading(self, unsent: int) -> None:
        self._reading = self.loop.call_later(self.unread_s, self._check_reading, unsent)

    def _check_reading(self, before: int) -> None:
        self._reading = None
        if (unsent := self.transport.get_write_buffer_size()) < before:
            self._time_reading(unsent)
            return
        _log.warning("a client has read nothing for %g s: its connection is closed", self.unread_s)
        self.transport.abort()

    def _stop_sending(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
