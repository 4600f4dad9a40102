"""Helpers of the tests of damaged checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.errors import CheckpointError
from qvl_runtime.weights.checkpoint import Checkpoint


def fails(folder: Path, config: ModelConfig, *parts: str) -> None:
    """Opening raises an error of one line that contains all `parts`."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder, config)
    message = str(caught.value)
    assert "\n" not in message and "\x1b" not in message
    assert all(part in message for part in parts), message
