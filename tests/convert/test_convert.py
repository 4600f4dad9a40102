"""Conversion to a target's layout and back: every kind of source, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.convert.convert import ConvertOptions, convert, estimate
from qvl_runtime.convert.restore import restore
from qvl_runtime.convert.verify import verify
from qvl_runtime.errors import CheckpointError
from tests.checkpoints import MakeState, Write
from tests.gptq_checkpoints import GPTQ, gptq, same_files

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("name", GPTQ)
@pytest.mark.parametrize(("target", "shards"), [("cpu", 1), ("cpu", 3), ("cuda", 2)])
def test_gptq_and_back(
    name: str, target: str, shards: int, raw: dict[str, Any], make_state: MakeState, write: Write, tmp_path: Path
) -> None:
    source = write(raw, gptq(raw, make_state(ModelConfig.from_dict(raw)), name), shards=shards)
    manifest = convert(source, tmp_path / "converted", ConvertOptions(target=target))
    layouts = {linear.layout for linear in manifest.linears.values()}
    if target == "cpu":
        assert layouts == {"cpu-1"}
    else:  # what its kernels cannot hold (inputs dealt unevenly) stays as published
        assert layouts == {"gpu-int8-1" if GPTQ[name].bits == 8 else "gpu-1"} or GPTQ[name].desc_act
    assert "transformer.h.0.mlp.up_gate" in manifest.linears or GPTQ[name].desc_act
    assert verify(tmp_path / "converted").faults == []
    assert restore(tmp_path / "converted", tmp_path / "back").tensors_only == []
    same_files(source, tmp_path / "back")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("shards", [1, 2])
def test_floats_and_back(
    dtype: str, suffix: str, shards: int, raw: dict[str, Any], make_state: MakeState, write: Write, tmp_path: Path
) -> None:
    raw.update(fp32=False, torch_dtype=dtype)
    state = make_state(ModelConfig.from_dict(raw), getattr(torch, dtype))
    source = write(raw, state, suffix, shards)
    convert(source, tmp_path / "converted")
    files = restore(tmp_path / "converted", tmp_path / "back")
    assert len(files.exact if suffix == ".safetensors" else files.tensors_only) == shards
    back = {name: t for path in (tmp_path / "back").glob("*.safetensors") for name, t in load_file(path).items()}
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) and back[name].dtype == state[name].dtype for name in state)
    if suffix == ".safetensors":
        same_files(source, tmp_path / "back")
    elif shards > 1:
        index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
        assert all((tmp_path / "back" / file).is_file() for file in index["weight_map"].values())


def test_wider_floats_come_back_and_narrower_do_not(
    raw: dict[str, Any], make_state: MakeState, write: Write, tmp_path: Path
) -> None:
    source = write(raw, make_state(ModelConfig.from_dict(raw), torch.float16))
    convert(source, tmp_path / "wide", ConvertOptions(dtype="float32"))
    restore(tmp_path / "wide", tmp_path / "back")
    same_files(source, tmp_path / "back")
    convert(source, tmp_path / "narrow", ConvertOptions(dtype="bfloat16"))
    with pytest.raises(CheckpointError, match=r"were rounded .*weights of another dtype"):
        restore(tmp_path / "narrow", tmp_path / "no")
    assert not (tmp_path / "no").exists() and not list(tmp_path.glob(".*"))


def test_tensors_that_nothing_reads_come_back_too(
    raw: dict[str, Any], make_state: MakeState, write: Write, tmp_path: Path
) -> None:
    state = make_state(ModelConfig.from_dict(raw))
    state["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    source = write(raw, state)
    manifest = convert(source, tmp_path / "converted")
    assert not [name for name in manifest.state if "bias" in name and name.startswith("transformer.h.0.attn.b")]
    restore(tmp_path / "converted", tmp_path / "back")
    same_files(source, tmp_path / "back")


def test_estimate_writes_nothing_and_is_close(int4: Path, tmp_path: Path) -> None:
    estimated = estimate(int4, tmp_path / "new")
    assert not list(tmp_path.glob("*new*"))
    convert(int4, tmp_path / "new")
    made = sum(path.stat().st_size for path in (tmp_path / "new").glob("*.safetensors"))
    assert abs(made - (1 << 18) - estimated.bytes) < 0.05 * estimated.bytes and estimated.packed == 8
