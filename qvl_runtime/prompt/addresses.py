"""Where a URL leads: its parts, whether its host is allowed, and which addresses it has. None of it is dialed here.

Only public addresses count unless `allow_private_addresses` is set: a URL from outside must not reach what only this
machine can. Each name is looked up once, so that what was checked is what is dialed.
"""

from __future__ import annotations

import ipaddress
import queue
import socket
import threading
import time
from typing import Any, NamedTuple
from urllib.parse import quote, urljoin, urlsplit

from qvl_runtime.errors import DownloadError
from qvl_runtime.prompt.cancellation import Cancellation
from qvl_runtime.prompt.hosts import canonical
from qvl_runtime.prompt.limits import ImageLimits

_SAFE = "%/:=&?~#+!$,;'@()*[]"  # a browser shows 图.png; the request needs %E5...

# Source: IANA's registries of special-purpose addresses, as of 2026. `ipaddress.is_global` differs between versions of
# Python, and 168.63.129.16 is a service of Azure that every machine there reaches.
_NOT_PUBLIC_V4 = tuple(
    map(
        ipaddress.IPv4Network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
            *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
            *("203.0.113.0/24", "224.0.0.0/3", "168.63.129.16/32"),
        ),
    )
)
_UNICAST_V6 = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC_V6 = tuple(  # of those: protocols and Teredo, documentation twice, 6to4
    map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "3fff::/20", "2002::/16"))
)
_WITH_V4 = tuple(map(ipaddress.IPv6Network, ("::ffff:0:0/96", "64:ff9b::/96")))  # mapped, and NAT64
_MAX_LOOKUPS = 256  # at a time; one that was given up ends when the system's resolver gives up, after 5 to 30 s
_lookups = threading.BoundedSemaphore(_MAX_LOOKUPS)


class Target(NamedTuple):
    """An http(s) URL, checked and in ASCII."""

    url: str
    secure: bool
    host: str  # canonical
    port: int
    path: str  # with the query


class Address(NamedTuple):
    """One address of a host."""

    family: int
    dialed: Any  # for `socket.connect`


def parse_url(url: str, base: str = "") -> Target:
    """The parts of an http(s) URL, which may be relative to `base`. Raises `ValueError` that says what is wrong."""
    try:
        url = urljoin(base, url)
        parts = urlsplit(url)
        host, port = canonical(parts.hostname or ""), parts.port
    except ValueError:  # of the standard library, which quotes the URL
        raise ValueError("it has no valid host and port") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError("its scheme is neither http nor https")
    if not host or port == 0 or parts.username is not None or parts.password is not None:
        raise ValueError("it has no valid host and port")
    secure = parts.scheme == "https"
    path = quote(parts.path or "/", safe=_SAFE) + (f"?{quote(parts.query, safe=_SAFE)}" if parts.query else "")
    return Target(url, secure, host, port or (443 if secure else 80), path)


def is_public(address: str) -> bool:
    """Whether an IP address, as text, is one that anyone on the internet can reach."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if not any(ip in network for network in _WITH_V4):
            return ip in _UNICAST_V6 and not any(ip in network for network in _NOT_PUBLIC_V6)
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return not any(ip in network for network in _NOT_PUBLIC_V4)


def find_addresses(
    target: Target, limits: ImageLimits, described: str, deadline: float, cancellation: Cancellation
) -> list[Address]:
    """Look a host up, and return its addresses in the order in which to try them.

    Raises `DownloadError` if it has none, or any that is not public, in the same words: which names and ports exist
    inside a network is not told. Raises `TimeoutError` at the `deadline` (of `time.monotonic`).
    """
    found = _look_up(target.host, target.port, deadline, cancellation)
    if not limits.allow_private_addresses and not all(is_public(str(address.dialed[0])) for address in found):
        found = []
    if not found:
        private = (
            "" if limits.allow_private_addresses else ", or not at a public address (allow_private_addresses is off)"
        )
        raise DownloadError(f"{described} cannot be fetched: its host is unknown{private}")
    return found


def _look_up(host: str, port: int, deadline: float, cancellation: Cancellation) -> list[Address]:
    """The addresses of a host, none if it is unknown; in a thread, since a look-up cannot be given a time limit."""
    answers: queue.SimpleQueue[list[Address] | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answers.put([Address(family, address) for family, _, _, _, address in entries])
        except (OSError, UnicodeError):
            answers.put([])
        finally:
            _lookups.release()

    if not _lookups.acquire(blocking=False):
        raise OSError(f"{_MAX_LOOKUPS} names are being looked up, the limit; try again later")
    threading.Thread(target=work, name="qvl-lookup", daemon=True).start()
    with cancellation.ending_with(lambda: answers.put(None)):
        try:
            found = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise TimeoutError from None
    return found or []
