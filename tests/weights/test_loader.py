"""Loading: a converted folder is mapped, verified byte by byte, and refused on another device; one way of packing."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.convert.convert import convert
from qvl_runtime.convert.verify import verify
from qvl_runtime.errors import CheckpointError
from qvl_runtime.formats.gptq import GPTQ_TENSORS
from qvl_runtime.weights.loader import load_weights
from qvl_runtime.weights.manifest import MANIFEST, Manifest
from qvl_runtime.weights.packed_specs import decoder_groups
from qvl_runtime.weights.synthetic import synthetic_weights
from tests.checkpoints import MakeState, Write

pytestmark = pytest.mark.cpu


def mappings() -> list[tuple[int, int, str]]:
    """Address ranges of this process and the file that each is of."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        parts = line.split(maxsplit=5)
        first, last = (int(at, 16) for at in parts[0].split("-"))
        found.append((first, last, parts[5] if len(parts) > 5 else ""))
    return found


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="only Linux says what is mapped")
def test_loaded_tensors_are_the_file_and_aligned(int4: Path, tmp_path: Path) -> None:
    manifest = convert(int4, tmp_path / "converted")
    config = ModelConfig.from_folder(int4)
    weights = load_weights(tmp_path / "converted", config, torch.float16, torch.device("cpu"))
    of_files = [m for m in mappings() if m[2].startswith(str(tmp_path / "converted"))]
    packed = [t for linear in weights.packed.values() for t in linear.tensors.values()]
    for tensor in [*weights.state.values(), *packed]:
        at = tensor.data_ptr()
        assert any(first <= at < last for first, last, _ in of_files), "copied"
        assert at % (64 if tensor.nbytes % 64 == 0 else tensor.element_size()) == 0
    assert len(weights.packed) == len(manifest.linears) == 8


@pytest.mark.parametrize(("kernels", "layout"), [("", "cpu-1"), ("triton", "gpu-1"), ("reference", "gptq")])
def test_packed_linears_come_through_one_door(
    kernels: str, layout: str, int4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published or synthetic, for any kernels: the loader packs every decoder linear and merges w1 with w2."""
    monkeypatch.setenv("QVL_KERNELS", kernels)
    config, device = ModelConfig.from_folder(int4), torch.device("cpu")
    for weights in (
        load_weights(int4, config, torch.float16, device),
        synthetic_weights(config, torch.float16, device),
    ):
        assert set(weights.packed) == {name for name, _ in decoder_groups(config)}
        assert {packed.layout for packed in weights.packed.values()} == {layout}
        assert not [name for name in weights.state if name.endswith(tuple(f".{kind}" for kind in GPTQ_TENSORS[:4]))]


def test_linears_are_packed_on_their_device(int4: Path) -> None:
    config = ModelConfig.from_folder(int4)
    weights = load_weights(int4, config, torch.float16, torch.device("meta"))
    assert set(weights.packed) == {name for name, _ in decoder_groups(config)}
    tensors = [tensor for packed in weights.packed.values() for tensor in packed.tensors.values()]
    assert {tensor.device.type for tensor in [*tensors, *weights.state.values()]} == {"meta"}


def test_dense_weights_are_merged_for_a_gpu_only(raw: dict[str, Any], make_state: MakeState, write: Write) -> None:
    config = ModelConfig.from_dict(raw)
    folder = write(raw, make_state(config))
    on_cpu = load_weights(folder, config, torch.float32, torch.device("cpu"))
    on_gpu = load_weights(folder, config, torch.float32, torch.device("meta"))
    merged, parts = (
        "transformer.h.0.mlp.up_gate.weight",
        [f"transformer.h.0.mlp.{part}.weight" for part in ("w1", "w2")],
    )
    assert merged not in on_cpu.state and all(part in on_cpu.state for part in parts)
    assert on_gpu.state[merged].shape == (2 * config.ffn_width, config.hidden_size)
    assert not [part for part in parts if part in on_gpu.state]


def test_flipped_bytes_are_found_and_named(int4: Path, tmp_path: Path) -> None:
    folder = tmp_path / "converted"
    (file,) = convert(int4, folder).shards
    whole = (folder / file).read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    generator = random.Random(0)

    def faults_with(place: int) -> list[str]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << generator.randrange(8)
        (folder / file).write_bytes(damaged)
        return verify(folder).faults

    for name in generator.sample(sorted(header.keys() - {"__metadata__"}), 5):
        place = start + generator.randrange(*header[name]["data_offsets"])
        assert faults_with(place) == [f"{name} in {file} was changed"]
    assert f"the header of {file} was changed" in faults_with(start - 1)
    (folder / file).write_bytes(whole[:-1])
    assert "damaged or truncated" in verify(folder).faults[-1]
    (folder / file).unlink()
    (folder / "config.json").write_text("{}")
    assert verify(folder).faults == ["config.json was changed", f"{file} is missing"]
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"bits": 4', '"bits": 8', 1))
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        verify(folder)


def test_a_folder_for_another_device_or_version(int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, config = tmp_path / "converted", ModelConfig.from_folder(int4)
    convert(int4, folder)
    with pytest.raises(CheckpointError, match="was converted for cpu and cannot run on cuda"):
        load_weights(folder, config, torch.float16, torch.device("cuda"))
    monkeypatch.setenv("QVL_KERNELS", "reference")
    with pytest.raises(CheckpointError, match="in the layout 'cpu-1'; the kernels here read 'gptq'"):
        load_weights(folder, config, torch.float16, torch.device("cpu"))
    content = json.loads((folder / MANIFEST).read_text()) | {"format": 99}
    (folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="has format 99; expected 1"):
        Manifest.read(folder)
