"""Packed linears of strangers: no size and no index reaches a kernel that does not fit its buffers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from qvl_kernels import ops_for
from qvl_runtime.convert.restore import restore
from qvl_runtime.convert.verify import verify
from qvl_runtime.errors import CheckpointError
from qvl_runtime.weights.converted import Converted
from qvl_runtime.weights.loader import load_weights, model_config
from tests.faults.conftest import Copy
from tools.fuzz.converted import change_manifest, change_tensors
from tools.fuzz.values import NUMBERS, TEXTS

CPU = torch.device("cpu")
LINEAR = "transformer.h.0.attn.c_attn"
INPUTS = 128
Tensors = dict[str, Tensor]
STRANGE: tuple[Any, ...] = (*TEXTS, *NUMBERS, None, True, False, [], {}, [[]], [None], {"a": {}}, ["lines"])


def refused(folder: Path, *expected: str) -> None:
    """Loading, restoring and verifying name the fault; `verify` cannot be satisfied by a new digest."""
    with pytest.raises(CheckpointError) as caught:
        load_weights(folder, model_config(folder), torch.float32, CPU) if folder.name != "cuda" else _open(folder)
    assert str(caught.value).isprintable() and all(part in str(caught.value) for part in expected), caught.value
    if folder.name != "rounded":
        with pytest.raises(CheckpointError):
            restore(folder, folder.parent / "back")
    assert len(verify(folder).faults) == 1
    assert not (folder.parent / "back").exists()


def _open(folder: Path) -> None:
    converted = Converted.open(folder)
    for name in converted.manifest.linears:
        converted.linear(name)


def packed_names(target: str, tensors: Tensors, *kinds: str) -> list[str]:
    return [name for name in tensors if name.startswith(f"{LINEAR}.{target}.") and name.rpartition(".")[2] in kinds]


def change_part(tensors: Tensors, target: str, part: str, change: Callable[[Tensor], Tensor]) -> None:
    for name in packed_names(target, tensors, part):
        tensors[name] = change(tensors[name])


def set_field(content: dict[str, Any], field: str, value: object) -> None:
    content["linears"][LINEAR][field] = value


def set_size(content: dict[str, Any], field: str, value: object) -> None:
    content["linears"][LINEAR]["fields"][field] = value


@pytest.mark.parametrize("kind, target, order", [("plain", "cpu", "perm"), ("cuda", "cuda", "order")])
@pytest.mark.parametrize("value", [0x7FFFFFFF, 0x00100000, -1, -2, -(2**31), INPUTS, 0])
@pytest.mark.parametrize("at", [slice(None), slice(5, 6)])
def test_permutations(copy_of: Copy, kind: str, target: str, order: str, value: int, at: slice) -> None:
    folder = copy_of(kind)

    def change(tensors: Tensors) -> None:
        for name in packed_names(target, tensors, order):
            assert int(tensors[name][5]) > 0
            tensors[name][at] = value

    change_tensors(folder, change)
    refused(folder, LINEAR, "a permutation with")


@pytest.mark.parametrize("field", ["bits", "group", "inputs", "padded", "outputs"])
@pytest.mark.parametrize("factor", [2, 0, 0.5])
@pytest.mark.parametrize("name", [LINEAR, "lm_head", "transformer.visual.proj"])
def test_sizes(copy_of: Copy, name: str, field: str, factor: float) -> None:
    folder = copy_of("rounded")

    def change(content: dict[str, Any]) -> None:
        fields = content["linears"][name]["fields"]
        fields[field] = int(fields[field] * factor)

    change_manifest(folder, change)
    refused(folder, name)


@pytest.mark.parametrize("field", ["inputs", "group", "outputs"])
def test_sizes_for_a_gpu(copy_of: Copy, field: str) -> None:
    folder = copy_of("cuda")
    for value in (0, 1, 2**40):
        change_manifest(folder, partial(set_size, field=field, value=value))
        with pytest.raises(CheckpointError, match=LINEAR):
            _open(folder)


def test_all_sizes_doubled(copy_of: Copy) -> None:
    folder = copy_of("plain")

    def change(content: dict[str, Any]) -> None:
        for linear in content["linears"].values():
            linear["fields"] = {name: 2 * value for name, value in linear["fields"].items()}

    change_manifest(folder, change)
    refused(folder)


def test_two_linears_swapped(copy_of: Copy) -> None:
    """Each fits itself, and neither its place."""
    folder, other = copy_of("plain"), "transformer.h.0.mlp.c_proj"

    def change(tensors: Tensors) -> None:
        ours = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{LINEAR}.cpu")}
        theirs = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{other}.cpu")}
        for name in (*ours, *theirs):
            del tensors[name]
        tensors |= {name.replace(LINEAR, other): tensor for name, tensor in ours.items()}
        tensors |= {name.replace(other, LINEAR): tensor for name, tensor in theirs.items()}

    def swap(content: dict[str, Any]) -> None:
        linears = content["linears"]
        mine, yours = linears[LINEAR], linears[other]
        linears[LINEAR] = {**yours, "parts": mine["parts"]}
        linears[other] = {**mine, "parts": yours["parts"]}

    change_tensors(folder, change)
    change_manifest(folder, swap)
    refused(folder, "config.json requires")


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "shorter": lambda t: t.flatten()[:-1].clone(),
    "longer": lambda t: torch.cat([t.flatten(), t.flatten()]),
    "of another dtype": lambda t: t.to(torch.int16),
    "of wider numbers": lambda t: t.to(torch.float64),
    "empty": lambda t: t.flatten()[:0].clone(),
    "a number": lambda t: t.flatten()[0].clone(),
    "of another shape": lambda t: t.reshape(1, -1, 1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("part", ["lines", "scales", "zeros", "perm", "bias"])
def test_parts(copy_of: Copy, part: str, change: Callable[[Tensor], Tensor]) -> None:
    folder = copy_of("plain")
    change_tensors(folder, partial(change_part, target="cpu", part=part, change=change))
    refused(folder, LINEAR)


@pytest.mark.parametrize("part", ["words", "scales", "zeros", "order", "bias"])
def test_parts_for_a_gpu(copy_of: Copy, part: str) -> None:
    for change in CHANGES.values():
        folder = copy_of("cuda")
        change_tensors(folder, partial(change_part, target="cuda", part=part, change=change))
        with pytest.raises(CheckpointError, match=LINEAR):
            _open(folder)
        for path in sorted(folder.iterdir()):
            path.unlink()
        folder.rmdir()


@pytest.mark.parametrize("part", ["lines", "scales", "bias"])
def test_parts_that_are_missing(copy_of: Copy, part: str) -> None:
    folder = copy_of("plain")
    change_manifest(folder, lambda content: content["linears"][LINEAR]["tensors"].remove(part))
    refused(folder, LINEAR)


@pytest.mark.parametrize("field", ["layout", "tensors", "fields", "parts", "rounded"])
def test_strange_values_of_every_field(copy_of: Copy, field: str) -> None:
    folder = copy_of("plain")
    before = (folder / "qvl_manifest.json").read_bytes()
    for value in STRANGE:
        if field == "rounded" and value is False:
            continue
        (folder / "qvl_manifest.json").write_bytes(before)
        change_manifest(folder, partial(set_field, field=field, value=value))
        with pytest.raises(CheckpointError):
            load_weights(folder, model_config(folder), torch.float32, CPU)


@pytest.mark.parametrize("seed", range(12))
def test_codes_and_scales_can_be_anything(copy_of: Copy, seed: int) -> None:
    """They make a wrong answer, and no wrong address: each linear runs at one row and at many."""
    folder, random = copy_of("rounded"), Random(seed)

    def change(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if name.rpartition(".")[2] in ("lines", "scales", "zeros", "bias") and ".cpu." in name:
                data = torch.frombuffer(bytearray(random.randbytes(tensor.nbytes)), dtype=tensor.dtype)
                tensors[name] = data.view(tensor.shape)

    change_tensors(folder, change)
    weights, ops = load_weights(folder, model_config(folder), torch.float32, CPU), ops_for(CPU)
    for packed in weights.packed.values():
        for precision in ("exact", "fast"):
            linear = ops.bind(packed, precision)
            for rows in (1, 3, 40):
                assert linear(torch.ones(rows, packed.fields["inputs"])).shape == (rows, packed.fields["outputs"])


def test_what_is_right_is_checked_in_no_time(converted_once: Path) -> None:
    for kind in ("plain", "rounded"):
        load_weights(converted_once / kind, model_config(converted_once / kind), torch.float32, CPU)
        assert verify(converted_once / kind).faults == []
    _open(converted_once / "cuda")
