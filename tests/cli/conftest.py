"""Fixtures of the command line tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from qvl_runtime.cli.options import ModelOptions
from tests.fakes import FakeEngine, make_image


@pytest.fixture
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """A fake engine that every command opens."""
    engine = FakeEngine()
    monkeypatch.setattr(ModelOptions, "open", lambda self: engine)
    return engine


@pytest.fixture
def image(tmp_path: Path) -> str:
    """The path of a white image."""
    return str(make_image(tmp_path / "dog.png"))
