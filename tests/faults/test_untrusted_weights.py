"""Weight files of strangers: pickles, headers and indexes that lie. A typed error, in bounded time and memory."""

from __future__ import annotations

import collections
import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.convert.convert import convert
from qvl_runtime.convert.restore import restore
from qvl_runtime.errors import CheckpointError
from qvl_runtime.plan.options import PlanOptions
from qvl_runtime.weights.checkpoint import Checkpoint, load_state
from qvl_runtime.weights.shards import MAX_HEADER, open_shard
from tests.checkpoints import MakeState, Write
from tests.gptq_checkpoints import same_files
from tools.fuzz.values import damaged_bytes

TENSOR = torch.arange(6.0)


def saved(content: object, old: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


def with_pickle(data: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive of torch.save with another pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved({"w": TENSOR}))) as source, zipfile.ZipFile(buffer, "w") as target:
        for entry in source.infolist():
            content = data if entry.filename.endswith("data.pkl") else source.read(entry)
            target.writestr(entry.filename, content, compression)
    return buffer.getvalue()


def bomb(levels: int) -> bytes:
    """A dict whose key is a tuple of tuples: hashing it visits 2^levels parts."""
    ops = b"\x80\x02}" + b")q\x00"
    for level in range(levels):
        ops += b"h" + bytes([level]) + b"\x86q" + bytes([level + 1])
    return ops + b"K\x01s."


def opened(tmp_path: Path, data: bytes, name: str = "pytorch_model.bin") -> Any:
    path = tmp_path / name
    path.write_bytes(data)
    shard = open_shard(path)
    return {key: shard.tensor(key) for key in shard.infos}


PICKLES: dict[str, bytes] = {
    "int keys": saved({1: TENSOR}),
    "tuple keys": saved({(1, "a"): TENSOR}),
    "sparse": saved({"w": TENSOR.to_sparse()}),
    "meta": saved({"w": TENSOR.to("meta")}),
    "nested": saved({"a": {"b": {"c": TENSOR}}}),
    "a list": saved([TENSOR]),
    "a tensor": saved(TENSOR),
    "nothing": saved(None),
    "numbers": saved({"w": 3}),
    "counter": saved(collections.Counter("abc")),
    "expanded": saved({"w": TENSOR[:1].expand(2**40)}),
    "expanded, old": saved({"w": TENSOR[:1].expand(2**40)}, old=True),
    "bytearray": with_pickle(b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + struct.pack("<Q", 2**34)[:5] + b"\x85R."),
    "tuple bomb": with_pickle(bomb(200)),
    "code": with_pickle(pickle.dumps(print, 2)),
    "no end": with_pickle(b"\x80\x02}"),
    "not a pickle": with_pickle(b"\xff" * 100),
    "empty pickle": with_pickle(b""),
    "unknown memo": with_pickle(b"\x80\x02h\x05."),
    "long name": with_pickle(b"\x80\x02X\xff\xff\xff\x7f."),
    "compressed": with_pickle(b"\x80\x02}.", zipfile.ZIP_DEFLATED),
    "pickle of zeros": with_pickle(b"\0" * (17 << 20)),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("data", PICKLES.values(), ids=PICKLES)
def test_pickles(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, data)
    assert "pytorch_model.bin" in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("old", [False, True])
def test_damaged_pickles(tmp_path: Path, old: bool) -> None:
    data, found = saved({"a": TENSOR, "b": torch.nn.Parameter(TENSOR), "c": TENSOR.half()}, old), 0
    for seed in range(150):
        try:
            opened(tmp_path, damaged_bytes(Random(seed), data))
        except CheckpointError:
            found += 1
    assert 0 < found < 150


@pytest.mark.parametrize("old", [False, True])
def test_what_is_right_is_read(tmp_path: Path, old: bool) -> None:
    state = {f"{number}.weight": torch.full((number + 1, 2), float(number)) for number in range(200)}
    state |= {"scalar": torch.tensor(1.0), "empty": torch.zeros(0, 4), "shared": state["3.weight"], "cut": TENSOR[2:4]}
    read = opened(tmp_path, saved(collections.OrderedDict(state), old))
    assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)


def safetensors(header: object, data: bytes = b"\0" * 24, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: object = (6,), offsets: object = (0, 24), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS: dict[str, bytes] = {
    "2^40 bytes": safetensors({"w": entry()}, length=2**40),
    "2^64 - 1 bytes": safetensors({"w": entry()}, length=2**64 - 1),
    "over the limit": safetensors(b'{"w":' + b" " * MAX_HEADER + b"{}}"),
    "deep": safetensors(b'{"w":' + b"[" * 100_000),
    "overlapping": safetensors({"a": entry(), "b": entry()}),
    "a hole": safetensors({"a": entry((2,), (0, 8)), "b": entry((2,), (16, 24))}),
    "beyond the file": safetensors({"w": entry((600,), (0, 2400))}),
    "backwards": safetensors({"w": entry((6,), (24, 0))}),
    "negative": safetensors({"w": entry((-6,))}),
    "negative offset": safetensors({"w": entry((6,), (-24, 0))}),
    "overflow": safetensors({"w": entry((2**40, 2**40), (0, 24))}),
    "other dtype": safetensors({"w": entry(dtype="F9")}),
    "no shape": safetensors({"w": {"dtype": "F32", "data_offsets": [0, 24]}}),
    "shape of text": safetensors({"w": entry("6")}),
    "not a dict": safetensors([1]),
    "metadata of numbers": safetensors({"__metadata__": {"a": 1}, "w": entry()}),
    "cut": safetensors({"w": entry()})[:20],
    "eight bytes": b"\0" * 8,
    "empty": b"",
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("data", HEADERS.values(), ids=HEADERS)
def test_headers(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        opened(tmp_path, data, "model.safetensors")


@pytest.mark.timeout(60)
def test_damaged_headers(tmp_path: Path) -> None:
    data = save({"a": TENSOR, "b": TENSOR.half(), "c": torch.zeros(0, 3), "d": torch.tensor(3)})
    for seed in range(300):
        try:
            opened(tmp_path, damaged_bytes(Random(seed), data), "model.safetensors")
        except CheckpointError as error:
            assert str(error).isprintable()


@pytest.mark.parametrize(
    "files",
    ["x" * 300, "../model.safetensors", "/dev/zero", "a\0b", "", ".", 3, None, ["a"], {"a": 1}, "\ud800", "C:x"],
)
def test_indexes(tmp_path: Path, raw: dict[str, Any], files: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw))
    index = {"weight_map": {"transformer.wte.weight": files}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="weight_map"):
        Checkpoint.open(tmp_path)


IGNORED = {
    "F8": torch.zeros(4, dtype=torch.float8_e4m3fn),
    "U16": torch.ones(4, dtype=torch.uint16),
    "bool": torch.ones(1, 1, 5, 5, dtype=torch.bool),
    "F64": torch.rand(3, dtype=torch.float64),
    "F32": torch.rand(3),
    "I64": torch.arange(3),
}


@pytest.mark.parametrize("tensor", IGNORED.values(), ids=IGNORED)
def test_tensors_that_nothing_reads_may_have_any_dtype(
    raw: dict[str, Any], make_state: MakeState, write: Write, tmp_path: Path, tensor: torch.Tensor
) -> None:
    """They keep it through a conversion, whatever dtype the model's floats have."""
    from qvl_runtime.cli.info import model_summary
    from qvl_runtime.cli.plan import plan_report

    raw.update(fp32=False, bf16=True)
    config = ModelConfig.from_dict(raw)
    source = write(raw, make_state(config, torch.bfloat16) | {"transformer.h.0.attn.masked_bias": tensor})
    load_state(source, config, torch.bfloat16)
    plan_report(source, None, PlanOptions(), measure=False)
    assert model_summary(source)["bytes"] > 0
    convert(source, tmp_path / "new")
    restore(tmp_path / "new", tmp_path / "back")
    same_files(source, tmp_path / "back")


def test_ignored_tensors_of_a_dtype_that_torch_has_not(
    raw: dict[str, Any], make_state: MakeState, write: Write, tmp_path: Path
) -> None:
    config = ModelConfig.from_dict(raw)
    source = write(raw, {})
    path = source / "model.safetensors"
    save_file(make_state(config) | {"transformer.h.0.attn.masked_bias": torch.zeros(8, dtype=torch.uint8)}, path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["transformer.h.0.attn.masked_bias"]["dtype"] = "F8_E8M0"
    path.write_bytes(safetensors(header, data[8 + length :]))
    load_state(source, config, torch.float32)
    with pytest.raises(CheckpointError, match="'F8_E8M0', which cannot be copied"):
        convert(source, tmp_path / "new")
    assert not (tmp_path / "new").exists()
