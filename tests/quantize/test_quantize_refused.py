"""Errors that a quantization raises before the work; nothing is written."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qvl_runtime.errors import CapacityError, CheckpointError, ConfigError
from qvl_runtime.quantize.options import QuantizeOptions
from qvl_runtime.quantize.quantizer import Quantizer
from tests.quantize.quantized import FEW

pytestmark = pytest.mark.cpu


def test_sources_and_destinations_that_cannot_be(source: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="quantized already, to 4 bits"):
        Quantizer.open(whole, tmp_path / "out", FEW)
    with pytest.raises(CheckpointError, match="exists already"):
        Quantizer.open(source, whole, FEW)
    with pytest.raises(CheckpointError, match="is the source itself"):
        Quantizer.open(source, source, FEW)
    with pytest.raises(ConfigError, match="group size is 48; supported are 32, 64, 128, -1"):
        QuantizeOptions(group_size=48)
    with pytest.raises(ConfigError, match="bits is 3"):
        QuantizeOptions(bits=3)
    with pytest.raises(ConfigError, match="there are 1 conversations"):
        Quantizer.open(source, tmp_path / "out", replace(FEW, samples=1))
    with pytest.raises(CapacityError, match=r"needs about .* GiB, and 0.0 GiB are free"):
        Quantizer.open(source, tmp_path / "out", FEW).check_memory(1000)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported_first(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes while it is made and its disk has 1,000 free"):
        Quantizer.open(source, tmp_path / "deep" / "out", FEW)


def test_weights_that_float16_cannot_hold_are_named_first(source: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    shutil.copytree(source, wide)
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"][3, 4] = 1e6
    save_file(state, wide / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head.weight holds 1e\+06, beyond the 65504"):
        Quantizer.open(wide, tmp_path / "out", FEW)


@pytest.mark.parametrize("drift", [-0.1, 1.5, float("nan")])
def test_a_drift_that_is_no_share_is_refused(drift: float) -> None:
    with pytest.raises(ConfigError, match="expected a share from 0"):
        QuantizeOptions(drift=drift)
