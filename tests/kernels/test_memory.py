"""A tile that is mapped over and over, and systems that do not allow it."""

from __future__ import annotations

import errno
import mmap
import os
import sys
from typing import NoReturn

import pytest
import torch

from qvl_kernels import memory

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux has memfd_create"),
]
TILE = torch.arange(4 * mmap.PAGESIZE // 4, dtype=torch.int32)


def test_a_tile_is_repeated() -> None:
    nbytes = TILE.nbytes * 5 // 2
    mapped = memory.repeated(TILE, nbytes)
    if mapped is None:
        pytest.skip("the system does not allow it here")
    assert torch.equal(mapped.view(torch.int32), TILE.repeat(3)[: nbytes // 4])


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS, errno.ENOMEM])
def test_a_system_that_forbids_it(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(name: str) -> NoReturn:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "memfd_create", refuse)
    assert memory.repeated(TILE, TILE.nbytes * 2) is None


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_tile_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "memfd_create", lambda name: os.open("/dev/full", os.O_RDWR))
    assert memory.repeated(TILE, TILE.nbytes * 2) is None
