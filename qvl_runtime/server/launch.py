"""Run the server until it is told to end: load, answer, drain, stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from qvl_runtime.errors import ConfigError
from qvl_runtime.server.app import make_app
from qvl_runtime.server.config import ServerConfig
from qvl_runtime.server.connection import Connection
from qvl_runtime.server.garbage import loaded_for_good
from qvl_runtime.server.keys import Keys
from qvl_runtime.server.service import Service, raise_failure

if TYPE_CHECKING:
    from qvl_runtime.engine.engine import Engine

_log = logging.getLogger("qvl_runtime")
_KEEP_ALIVE_S = 75  # above the 60 s after which nginx closes an idle connection, so that it is the one who does
_CLOSE_S = 3  # for connections to end, once their requests have
_BACKLOG = 2048  # connections that are not accepted yet
_LONGEST_HEAD = 65_536  # bytes of the request line and headers


class Server(uvicorn.Server):
    """uvicorn's server, which drains before it ends: the first signal begins that, a second one ends at once."""

    def __init__(self, config: uvicorn.Config, service: Service, keys: Keys) -> None:
        super().__init__(config)
        self.signal = 0  # the first that came
        self.on_listening: Callable[[], None] = lambda: None
        self._service, self._keys = service, keys
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        self._loop = asyncio.get_running_loop()
        if hasattr(signal, "SIGHUP") and _in_main_thread():
            self._loop.add_signal_handler(signal.SIGHUP, self._read_keys)
        await super().startup(sockets)
        self.on_listening()  # from here on signals are handled

    async def on_tick(self, counter: int) -> bool:
        """Whether to end, which uvicorn asks ten times a second."""
        return await super().on_tick(counter) or self._service.is_over

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain, or end at once."""
        if self.signal or self._loop is None or self._service.state != "ready":
            self.force_exit = self.signal != 0 and self._service.state != "loading"
            if self.force_exit:  # what is cut off is asked for, and no error
                logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            self.signal = self.signal or sig
            self.should_exit = True
            return
        self.signal = sig
        self._loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """End once the running requests are answered, or the time for that is over. Called in the event loop."""

        async def work() -> None:
            await self._service.drain()
            await self._service.close()  # what still runs ends with an error that its client sees
            self.should_exit = True

        self._draining = asyncio.ensure_future(work())

    def _read_keys(self) -> None:
        try:
            self._keys.read()
        except (ConfigError, OSError) as error:  # those from before stay
            _log.warning("the API keys were not read again: %s", error)


def make_server(
    service: Service,
    keys: Keys,
    host: str = "127.0.0.1",
    port: int = 8000,
    write: Callable[[str], None] | None = None,
    trusted_proxies: str | None = None,
) -> Server:
    """A server that is not started. trusted_proxies: addresses whose X-Forwarded-For is believed, in the log."""
    config = uvicorn.Config(
        make_app(service, keys, write),
        host=host,
        port=port,
        http=Connection,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        proxy_headers=trusted_proxies is not None,
        forwarded_allow_ips=trusted_proxies,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_CLOSE_S,
        h11_max_incomplete_event_size=_LONGEST_HEAD,
    )
    return Server(config, service, keys)


def serve(
    load: Callable[[], Engine],
    config: ServerConfig,
    keys: Keys,
    host: str,
    port: int,
    write: Callable[[str], None] | None = None,
    trusted_proxies: str | None = None,
    announce: Callable[[str], None] = lambda url: None,
    ready: Callable[[Engine], None] = lambda engine: None,
) -> int:
    """Serve until a signal ends it, and return that. Raises what `load` raises, and `OSError` for a port in use.

    announce: called with the URL once it listens; ready: with the engine once requests are taken.
    """
    service = Service(partial(loaded_for_good, load), config)
    service.on_ready = ready
    server = make_server(service, keys, host, port, write, trusted_proxies)
    with listening_socket(host, port) as sock:
        shown = f"[{host}]" if ":" in host else host
        server.on_listening = partial(announce, f"http://{shown}:{sock.getsockname()[1]}")
        asyncio.run(server.serve(sockets=[sock]))
    raise_failure(service)
    return server.signal


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any that is free. Raises `OSError`, which names the address."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        family, kind, proto, _, address = found[0]
        # asyncio turns off Nagle's algorithm, which would hold back every second small packet for 40 ms, only for
        # sockets that are made with their protocol; socket.create_server makes them without.
        sock = socket.socket(family, kind, proto)
        try:
            if os.name == "posix":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(_BACKLOG)
        except OSError:
            sock.close()
            raise
        return sock
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"{host}:{port}") from None


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
