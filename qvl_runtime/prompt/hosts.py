"""Names of hosts: one spelling for each, and whether an option allows one."""

from __future__ import annotations

import ipaddress
import re

_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")
_MAX_NAME = 253  # characters, RFC 1035


def canonical(host: str) -> str:
    """A host in lower case and ASCII, without final dot, or an IPv6 address without brackets; "" if it is not valid."""
    host = host.removesuffix(".")
    try:
        if ":" in host and "%" not in host:  # no zones: they are of this machine
            return str(ipaddress.IPv6Address(host.removeprefix("[").removesuffix("]")))
        if len(host) > _MAX_NAME:
            return ""
        host = host.encode("idna").decode("ascii").lower()
    except ValueError:  # UnicodeError is one
        return ""
    return host if _NAME.fullmatch(host) else ""


def is_pattern(name: object) -> bool:
    """Whether an entry of `allow_urls` is a host, or `*.` and a host."""
    return isinstance(name, str) and canonical(name.removeprefix("*.")) != ""


def is_allowed(host: str, allow_urls: bool | tuple[str, ...]) -> bool:
    """Whether `allow_urls` allows a canonical host: True any, False none, names those; *.example.com its subdomains."""
    if isinstance(allow_urls, bool):
        return allow_urls
    for name in allow_urls:
        wanted = canonical(name.removeprefix("*."))
        if host.endswith(f".{wanted}") if name.startswith("*.") else host == wanted:
            return True
    return False
