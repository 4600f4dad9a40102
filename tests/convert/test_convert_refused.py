"""Errors that a conversion raises before it writes anything."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.convert.convert import ConvertOptions, convert
from qvl_runtime.convert.verify import verify
from qvl_runtime.errors import CheckpointError, ConfigError
from tests.checkpoints import MakeState, Write

pytestmark = pytest.mark.cpu


def test_options_that_do_not_exist() -> None:
    for wrong in ({"target": "tpu"}, {"vision": "int4"}, {"head": "int2"}, {"dtype": "int8"}):
        with pytest.raises(ConfigError, match="supported are"):
            ConvertOptions(**wrong)


def test_where_it_cannot_go(int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="there exists already"):
        convert(int4, tmp_path / "there")
    with pytest.raises(CheckpointError, match="is the source itself"):
        convert(int4, int4)
    with pytest.raises(ConfigError, match="does not exist"):
        convert(tmp_path / "there", tmp_path / "new")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="its disk has 1,000 free: make room for"):
        convert(int4, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_another_architecture(raw: dict[str, Any], make_state: MakeState, write: Write, tmp_path: Path) -> None:
    source = write(raw | {"model_type": "llama"}, make_state(ModelConfig.from_dict(raw)))
    with pytest.raises(ConfigError, match="another model"):
        convert(source, tmp_path / "new")


def test_a_converted_one_is_not_converted_again(int4: Path, tmp_path: Path) -> None:
    convert(int4, tmp_path / "converted")
    with pytest.raises(CheckpointError, match="is converted already"):
        convert(tmp_path / "converted", tmp_path / "twice")
    with pytest.raises(CheckpointError, match="is not a converted checkpoint"):
        verify(int4)


def test_one_conversion_at_a_time(int4: Path, tmp_path: Path) -> None:
    from qvl_runtime.convert.journal import Journal

    with (
        Journal(tmp_path / "new", {}),
        pytest.raises(CheckpointError, match=rf"another process \({os.getpid()}\) is writing .*new/?"),
    ):
        convert(int4, tmp_path / "new")
