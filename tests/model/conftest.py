"""The oracle's two tiny checkpoints, loaded once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.model.oracle import Oracle


@pytest.fixture(scope="session")
def tiny(golden: Path) -> Oracle:
    return Oracle(golden, "tiny")


@pytest.fixture(scope="session")
def tiny_int4(golden: Path) -> Oracle:
    return Oracle(golden, "tiny-int4")
