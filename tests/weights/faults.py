"""What tests of damaged checkpoints share."""

from __future__ import annotations

from pathlib import Path

import pytest

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.errors import CheckpointError
from qvl_runtime.weights.checkpoint import Checkpoint


def fails(folder: Path, config: ModelConfig, *words: str) -> None:
    """Opening raises one line that says all these words."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder, config)
    message = str(caught.value)
    assert "\n" not in message and "\x1b" not in message
    assert all(word in message for word in words), message
