"""Weights that are no numbers, or overflow float16, are refused by name where they are converted or packed."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvl_runtime import Engine, SamplingParams
from qvl_runtime.convert.convert import convert
from qvl_runtime.convert.recipes import ConvertOptions
from qvl_runtime.errors import CheckpointError, NumericsError

pytestmark = pytest.mark.cpu
SHIPPED = Path(__file__).parents[2] / "qvl_runtime"
PROMPT = {"token_ids": [1, 2, 3]}
GREEDY = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
PLACES = ["transformer.ln_f.weight", "transformer.h.1.attn.c_attn.weight", "transformer.visual.conv1.weight"]


def damaged(tmp_path: Path, name: str, value: float, checkpoint: str = "nano") -> Path:
    """A copy of a shipped checkpoint with one value changed."""
    folder = tmp_path / checkpoint
    shutil.copytree(SHIPPED / checkpoint, folder)
    state = load_file(folder / "model.safetensors")
    state[name] = state[name].clone()
    state[name].view(-1)[7] = value
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


# Qwen3#381: a bf16 weight of 70,000 run in float16
@pytest.mark.parametrize("name", PLACES)
def test_overflow_of_float16_is_said_when_it_loads(tmp_path: Path, name: str) -> None:
    folder = damaged(tmp_path, name, 70_000.0)
    message = rf"{name} holds 70,?\d+, which overflows float16: use the dtype bfloat16 or float32"
    with pytest.raises(CheckpointError, match=message):
        Engine(folder, dtype="float16")
    for dtype in ("bfloat16", "float32"):
        assert Engine(folder, dtype=dtype, max_model_len=256).generate([PROMPT], GREEDY)[0].token_ids


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize(("value", "found"), [(math.nan, "NaN"), (math.inf, "an infinite"), (-math.inf, "an infinite")])
def test_damage_is_said_when_it_is_converted_to_another_dtype(
    tmp_path: Path, name: str, value: float, found: str
) -> None:
    folder = damaged(tmp_path, name, value)
    for dtype in ("float16", "float32"):
        with pytest.raises(CheckpointError, match=rf"{name} holds {found}"):
            Engine(folder, dtype=dtype)


def test_mapped_weights_are_not_read_for_it_and_the_request_tells(tmp_path: Path) -> None:
    engine = Engine(damaged(tmp_path, PLACES[0], math.nan), max_model_len=256)
    with pytest.raises(NumericsError, match="damaged weight"):
        engine.generate([PROMPT], GREEDY)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"precision": "fast"}, {"dtype": "bfloat16"}], ids=str)
def test_scales_of_packed_linears(tmp_path: Path, value: float, options: dict[str, Any]) -> None:
    name = "transformer.h.0.mlp.w1.scales"
    with pytest.raises(CheckpointError, match=rf"{name} holds "):
        Engine(damaged(tmp_path, name, value, "nano_int4"), **options)


@pytest.mark.parametrize(
    ("value", "options"),
    [
        (math.nan, ConvertOptions()),
        (math.inf, ConvertOptions(dtype="bfloat16")),
        (70_000.0, ConvertOptions(dtype="float16")),
        (math.nan, ConvertOptions(vision="int8")),
        (math.nan, ConvertOptions(head="int8")),
    ],
    ids=["NaN", "infinite", "overflow", "rounded vision", "rounded head"],
)
def test_conversion_refuses_them_and_can_be_repeated(tmp_path: Path, value: float, options: ConvertOptions) -> None:
    name = {"int8": "transformer.visual.transformer.resblocks.1.mlp.c_fc.weight"}.get(options.vision, PLACES[1])
    name = "lm_head.weight" if options.head == "int8" else name
    folder, target = damaged(tmp_path, name, value), tmp_path / "out"
    with pytest.raises(CheckpointError, match=rf"{name.removesuffix('.weight')}.* holds "):
        convert(folder, target, options)
    assert not target.exists()
    shutil.copyfile(SHIPPED / "nano" / "model.safetensors", folder / "model.safetensors")
    convert(folder, target, options)
    assert Engine(target, max_model_len=256).generate([PROMPT], GREEDY)[0].token_ids


def test_the_check_reads_no_mapped_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    aminmax: Any = torch.Tensor.aminmax

    def counted(self: torch.Tensor) -> Any:
        read.append(self.numel())
        return aminmax(self)

    monkeypatch.setattr(torch.Tensor, "aminmax", counted)
    Engine(SHIPPED / "nano", dtype="bfloat16", max_model_len=256)
    assert not read
    Engine(SHIPPED / "nano", dtype="float32", max_model_len=256)
    assert read
