"""Conversion to a target's layout and back: every kind of source, stopped, damaged, and with nowhere to go."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qvl_runtime.config import ModelConfig, QuantizationConfig
from qvl_runtime.errors import CheckpointError, ConfigError
from qvl_runtime.weights import tensor_file
from qvl_runtime.weights.convert import ConvertOptions, convert, outline
from qvl_runtime.weights.gptq import quantize_state
from qvl_runtime.weights.manifest import MANIFEST, Manifest
from qvl_runtime.weights.packed import load_weights, open_shards, packed_linear
from qvl_runtime.weights.restore import restore
from qvl_runtime.weights.save import quantized_config
from qvl_runtime.weights.verify import verify
from tests.weights.conftest import MakeState, Write
from tests.weights.kill import SHARD, converting

pytestmark = pytest.mark.cpu

GPTQ = {
    "int4": QuantizationConfig(4, 64),
    "int4 asymmetric": QuantizationConfig(4, 64, sym=False),
    "int4 one group": QuantizationConfig(4, -1),
    "int4 act-order": QuantizationConfig(4, 64, desc_act=True),
    "int4 act-order asymmetric": QuantizationConfig(4, 32, desc_act=True, sym=False),
    "int8 v2": QuantizationConfig(8, 32, sym=False, checkpoint_format="gptq_v2"),
}


def gptq(raw: dict[str, Any], state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The state rounded as `GPTQ[name]` says; act-order deals the inputs of each linear to groups at random."""
    kind = GPTQ[name]
    packed = quantize_state(state, ModelConfig.from_dict(raw), kind)
    if kind.desc_act:
        generator = torch.Generator().manual_seed(1)
        for key in [key for key in packed if key.endswith(".g_idx")]:
            packed[key] = packed[key][torch.randperm(len(packed[key]), generator=generator)]
    raw.update(quantized_config(raw, kind))
    return packed


@pytest.fixture
def int4(raw: dict[str, Any], make_state: MakeState, write: Write) -> Path:
    return write(raw, gptq(raw, make_state(ModelConfig.from_dict(raw)), "int4"), shards=2)


def same_files(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


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


def test_rounded_vision_and_head(raw: dict[str, Any], make_state: MakeState, write: Write, tmp_path: Path) -> None:
    state = make_state(ModelConfig.from_dict(raw))
    source = write(raw, state)
    manifest = convert(source, tmp_path / "small", ConvertOptions(vision="int8", head="int4"))
    assert manifest.linears["lm_head"].fields["bits"] == 4 and "lm_head.weight" not in manifest.state
    blocks = [name for name in manifest.linears if "resblocks.0" in name]
    assert len(blocks) == 4 and all(manifest.linears[name].fields["bits"] == 8 for name in blocks)
    from qvl_kernels import cpu_linear

    weights = load_weights(tmp_path / "small", ModelConfig.from_folder(source), torch.float32, torch.device("cpu"))
    for name, bits in [("lm_head", 4), (blocks[0], 8)]:
        weight, x = state[f"{name}.weight"], torch.eye(state[f"{name}.weight"].shape[1])
        y = cpu_linear.bind(weights.packed[name])(x) - state.get(f"{name}.bias", torch.zeros(len(weight)))
        step = (weight.amax(1) - weight.amin(1)).max() / (2**bits - 1) * (2 if bits == 8 else 1)
        assert (y.t() - weight).abs().max() <= step * 0.6  # half a step of the group, and float16 scales


@pytest.mark.parametrize("head", ["int4", "int8"])
def test_both_targets_round_to_the_same_levels(int4: Path, tmp_path: Path, head: str) -> None:
    from qvl_kernels import packing_for

    levels: dict[str, dict[str, torch.Tensor]] = {}
    for target in ("cpu", "cuda"):
        options = ConvertOptions(target=target, vision="int8", head=head)
        manifest = convert(int4, tmp_path / target, options)
        shards = open_shards(tmp_path / target, manifest)
        where = {name: shard for shard in shards.values() for name in shard.infos}
        levels[target] = {
            name: packing_for(target).gptq_levels(packed_linear(name, linear, manifest, where))
            for name, linear in manifest.linears.items()
        }
    assert levels["cpu"].keys() == levels["cuda"].keys()
    assert all(torch.equal(found, levels["cuda"][name]) for name, found in levels["cpu"].items())
    kinds = {name: linear.layout for name, linear in manifest.linears.items() if linear.rounded}
    assert kinds.pop("lm_head") == {"int4": "gpu-1", "int8": "gpu-int8-1"}[head]
    assert len(kinds) > 4 and set(kinds.values()) == {"gpu-int8-1"}


def test_what_has_no_kernel_is_not_rounded(int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qvl_kernels import reference

    monkeypatch.setattr("qvl_kernels.repack.pack_gptq", reference.pack_gptq)
    with pytest.raises(ConfigError, match=r"no kernel for transformer.visual.* in 8 bits: keep its floats"):
        convert(int4, tmp_path / "new", ConvertOptions(target="cuda", vision="int8"))


def test_options_that_do_not_exist() -> None:
    for wrong in ({"target": "tpu"}, {"vision": "int4"}, {"head": "int2"}, {"dtype": "int8"}):
        with pytest.raises(ConfigError, match="supported are"):
            ConvertOptions(**wrong)  # type: ignore[arg-type]


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
    with pytest.raises(CheckpointError, match="is no converted checkpoint"):
        verify(int4)


def test_a_disk_that_fills_up(int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tensor_file.os.fsync

    def full(handle: int) -> None:
        if os.fstat(handle).st_size > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        before(handle)

    monkeypatch.setattr(tensor_file.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"the disk is full .* make room and give the same command again"):
        convert(int4, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    convert(int4, tmp_path / "new")
    assert verify(tmp_path / "new").faults == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", folder]).returncode:
        pytest.skip("mounting a small file system takes root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_small(int4: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="make room for"):
        convert(int4, small_disk / "new")
    usage = shutil.disk_usage(small_disk)._replace(free=1 << 40)  # as if another program filled it meanwhile
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="the disk is full"):
        convert(int4, small_disk / "new")
    assert not (small_disk / "new").exists()


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
    with pytest.raises(CheckpointError, match="is not as it was written"):
        verify(folder)


def test_a_folder_for_another_device_or_version(int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, config = tmp_path / "converted", ModelConfig.from_folder(int4)
    convert(int4, folder)
    with pytest.raises(CheckpointError, match="laid out for cpu and is to run on cuda"):
        load_weights(folder, config, torch.float16, torch.device("cuda"))
    monkeypatch.setenv("QVL_KERNELS", "reference")
    with pytest.raises(CheckpointError, match="in the layout 'cpu-1'; what runs here reads 'gptq'"):
        load_weights(folder, config, torch.float16, torch.device("cpu"))
    content = json.loads((folder / MANIFEST).read_text()) | {"format": 99}
    (folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="has format 99; this version reads 1"):
        Manifest.read(folder)


def test_one_conversion_at_a_time(int4: Path, tmp_path: Path) -> None:
    from qvl_runtime.weights.journal import Journal

    with Journal.begin(tmp_path / "new", {}), pytest.raises(CheckpointError, match="another process is at work"):
        convert(int4, tmp_path / "new")


def test_outline_writes_nothing_and_is_close(int4: Path, tmp_path: Path) -> None:
    said = outline(int4, tmp_path / "new")
    assert not list(tmp_path.glob("*new*"))
    convert(int4, tmp_path / "new")
    made = sum(path.stat().st_size for path in (tmp_path / "new").glob("*.safetensors"))
    assert abs(made - (1 << 18) - said.bytes) < 0.05 * said.bytes and said.packed == 8


def test_kill_nine_at_ten_moments(int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever moment a conversion dies at: no destination that is not whole, and the same bytes in the end."""
    monkeypatch.setattr("qvl_runtime.weights.shard_writer.SHARD", SHARD)
    began = time.perf_counter()
    convert(int4, tmp_path / "whole")
    took = time.perf_counter() - began
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.weights.kill"])
    generator, kills, went_on = random.Random(0), 0, 0
    goal = tmp_path / "goal"
    for _ in range(40):
        started = context.Event()
        process = context.Process(target=converting, args=(int4, goal, started))
        process.start()
        started.wait(30)
        time.sleep(generator.uniform(0, 1.5 * took))
        process.kill()
        process.join()
        kills += process.exitcode != 0
        if goal.exists():
            assert verify(goal).faults == []
            same_files(goal, tmp_path / "whole")
            shutil.rmtree(goal)
        elif (tmp_path / ".goal.partial" / "journal.jsonl").is_file():
            went_on += len((tmp_path / ".goal.partial" / "journal.jsonl").read_text().splitlines()) > 1
        if kills == 10:
            break
    assert kills == 10 and went_on > 0
    converting(int4, goal)
    same_files(goal, tmp_path / "whole")
    assert not (tmp_path / ".goal.partial").exists()
