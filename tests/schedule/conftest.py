"""The small model that ships with the package, one engine for each file of tests."""

from __future__ import annotations

import pytest

from qvl_runtime import Engine


@pytest.fixture(scope="module")
def nano() -> Engine:
    return Engine(dtype="float32", max_model_len=8192, max_step_tokens=512)
