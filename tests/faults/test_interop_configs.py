"""What auto-gptq, Optimum and GPTQModel write into their configurations, with tensors of our own in the form of theirs.

interop_configs.json is a record of `python -m tools.interop --record`, which exchanges real checkpoints with them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.config.quantization import QuantizationConfig
from qvl_runtime.errors import CheckpointError
from qvl_runtime.formats.gptq import GPTQLinear
from qvl_runtime.formats.layout import decoder_linears
from qvl_runtime.weights.checkpoint import Checkpoint
from qvl_runtime.weights.loader import load_weights
from tests.checkpoints import MakeState
from tests.formats.test_gptq import dequantize
from tests.gptq_checkpoints import quantize_state

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "interop_configs.json").read_text())
CPU = torch.device("cpu")
LAST = "transformer.h.1.mlp.c_proj"


@pytest.fixture(params=CASES, ids=lambda case: f"{case['library']} {case['kind']}")
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = request.param
    return found


def settings(case: dict[str, Any]) -> QuantizationConfig:
    """What the tensors of a case are, whatever its labels say."""
    section = case["config"]["quantization_config"]
    ordered = not case["linear"]["in_order"]
    return QuantizationConfig(section["bits"], section["group_size"], ordered, section["sym"], case["stored"])


def write(case: dict[str, Any], raw: dict[str, Any], make_state: MakeState, folder: Path) -> dict[str, torch.Tensor]:
    """Write a folder as the library does; returns the weight [out, in] of each linear."""
    raw = {**raw, "intermediate_size": 512}
    float_config, quantization = ModelConfig.from_dict(raw), settings(case)
    state = quantize_state(make_state(float_config), float_config, quantization)
    generator = torch.Generator().manual_seed(0)
    linears, recorded = decoder_linears(float_config), case["linear"]["tensors"]
    for name in linears:
        if quantization.desc_act:
            order = torch.randperm(len(state[f"{name}.g_idx"]), generator=generator)
            state[f"{name}.g_idx"] = state[f"{name}.g_idx"][order]
        if "bias" not in recorded and not name.endswith("c_attn"):
            del state[f"{name}.bias"]
        for kind, (dtype, _) in recorded.items():
            if f"{name}.{kind}" in state:
                state[f"{name}.{kind}"] = state[f"{name}.{kind}"].to(getattr(torch, dtype))
    norm = getattr(torch, case["norm"])
    state |= {name: tensor.to(norm) for name, tensor in state.items() if name.rpartition(".")[0] not in linears}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**raw, **case["config"]}))
    if case["quantize_config"] is not None:
        (folder / "quantize_config.json").write_text(json.dumps(case["quantize_config"]))
    save_file(state, folder / case["file"])
    return {name: dequantize(GPTQLinear.from_state(state, name, quantization)) for name in linears}


def test_every_case_is_read_as_its_library_meant_it(
    case: dict[str, Any], raw: dict[str, Any], make_state: MakeState, tmp_path: Path
) -> None:
    expected = write(case, raw, make_state, tmp_path / "model")
    config = ModelConfig.from_folder(tmp_path / "model")
    checkpoint = Checkpoint.open(tmp_path / "model", config)
    assert config.quantization is not None
    for name, weight in expected.items():
        found = dequantize(GPTQLinear.from_state(checkpoint, name, config.quantization))
        assert torch.equal(found, weight), name
    assert checkpoint.info(f"{LAST}.qzeros").shape[0] == case["linear"]["tensors"]["qzeros"][1][0]
    weights = load_weights(tmp_path / "model", config, torch.float16, CPU)
    labels = {str(section.get("checkpoint_format") or section.get("format") or "gptq") for section in sections(case)}
    assert len(weights.notes) == (labels != {case["stored"]}), "a note where a label is wrong, and only there"


def sections(case: dict[str, Any]) -> list[dict[str, Any]]:
    return [section for section in (case["config"]["quantization_config"], case["quantize_config"]) if section]


def test_zero_points_are_those_of_the_format(case: dict[str, Any]) -> None:
    """What is known of symmetric ones holds for all that these libraries write."""
    quantization = settings(case)
    middle = 2 ** (quantization.bits - 1) - quantization.zero_offset
    low, high = case["linear"]["zero_points"]
    assert (low, high) == (middle, middle) if quantization.sym else low < middle < high


def test_all_three_libraries_are_recorded() -> None:
    kinds = {(case["library"], case["kind"]) for case in CASES}
    assert {library for library, _ in kinds} == {"auto-gptq", "gptqmodel", "optimum"}
    for library in ("auto-gptq", "gptqmodel", "optimum"):
        assert {(library, kind) for kind in ("symmetric", "asymmetric", "act-order", "8 bits")} <= kinds


@pytest.mark.parametrize("library", ["auto-gptq", "gptqmodel", "optimum"])
def test_a_symmetric_case_with_one_other_zero_point_is_refused(
    library: str, raw: dict[str, Any], make_state: MakeState, tmp_path: Path
) -> None:
    case = next(case for case in CASES if (case["library"], case["kind"]) == (library, "symmetric"))
    write(case, raw, make_state, tmp_path / "model")
    config = ModelConfig.from_folder(tmp_path / "model")
    state = {name: t.clone() for name, t in Checkpoint.open(tmp_path / "model", config).items()}
    state[f"{LAST}.qzeros"][-1, -1] ^= 0x30
    save_file(state, tmp_path / "model" / case["file"])
    with pytest.raises(CheckpointError, match=rf"{LAST}\.qzeros holds"):
        load_weights(tmp_path / "model", config, torch.float16, CPU)
