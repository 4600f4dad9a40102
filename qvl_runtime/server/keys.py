"""API keys from a file: one on each line, with a name for the log."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
from pathlib import Path
from typing import NamedTuple

from qvl_runtime.errors import ConfigError
from qvl_runtime.reading.regular_files import read_regular
from qvl_runtime.reading.text import decode
from qvl_runtime.server.errors import AUTHENTICATION, APIError
from qvl_runtime.server.requests import Caller, salt_of

_log = logging.getLogger("qvl_runtime")

LARGEST_FILE = 1 << 20
SHORTEST = 16  # characters of a key: shorter ones can be guessed
_CHALLENGE = {"WWW-Authenticate": "Bearer"}


class _Key(NamedTuple):
    digest: bytes  # SHA-256: of one length, whatever the key's
    caller: Caller


class Keys:
    """The keys that a request may carry; without any, no request needs one."""

    def __init__(self, path: Path | None = None) -> None:
        """Read a file of lines `KEY` or `KEY NAME`; # begins a comment. Raises `ConfigError`."""
        self._path = path
        self._secret = secrets.token_bytes(32)
        self._keys: list[_Key] = []
        self.read()

    def __len__(self) -> int:
        return len(self._keys)

    def read(self) -> None:
        """Read the file again, so that keys can be added and removed while the server runs. Raises `ConfigError`."""
        if self._path is not None:
            self._keys = self._read(self._path)

    def caller(self, authorization: str, x_api_key: str) -> Caller:
        """Who has sent a request with these headers. Raises `APIError` 401 for a key that is missing or wrong."""
        if not self._keys:
            return Caller(None)
        scheme, _, token = authorization.partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else x_api_key.strip()
        if not given:
            raise _refused("no API key: send it as `Authorization: Bearer KEY`", "missing_api_key")
        digest, found = hashlib.sha256(given.encode("latin-1", "replace")).digest(), None
        for key in self._keys:  # all of them, so that the time says nothing of which one it is
            if hmac.compare_digest(key.digest, digest):
                found = key.caller
        if found is None:
            raise _refused("the API key is wrong", "invalid_api_key")
        return found

    def _read(self, path: Path) -> list[_Key]:
        try:
            lines = decode(read_regular(path, ConfigError, LARGEST_FILE), str(path), ConfigError).splitlines()
            readable = os.stat(path).st_mode & 0o077 if os.name == "posix" else 0
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist; expected a file with an API key on each line") from None
        if readable:
            _log.warning("%s can be read by other users of this machine: chmod 600 it", path)
        keys = []
        for number, line in enumerate(lines, start=1):
            key, _, name = line.partition("#")[0].strip().partition(" ")
            if not key:
                continue
            if len(key) < SHORTEST or not key.isascii():
                raise ConfigError(f"{path} line {number} has a key of under {SHORTEST} ASCII characters: lengthen it")
            caller = Caller(name.strip() or f"key {number}", salt_of(key, self._secret))
            keys.append(_Key(hashlib.sha256(key.encode()).digest(), caller))
        if not keys:
            raise ConfigError(f"{path} holds no API key; expected one on each line")
        return keys


def _refused(message: str, code: str) -> APIError:
    return APIError(401, message, AUTHENTICATION, None, code, _CHALLENGE)
