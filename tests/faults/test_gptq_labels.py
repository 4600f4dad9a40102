"""What the tensors of a GPTQ checkpoint say about themselves counts, whatever their labels say."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qvl_runtime
from qvl_runtime import Engine, SamplingParams
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.config.quantization import FORMATS, QuantizationConfig
from qvl_runtime.convert.convert import convert
from qvl_runtime.convert.restore import restore
from qvl_runtime.errors import CheckpointError
from qvl_runtime.formats.gptq import GPTQLinear
from qvl_runtime.formats.layout import decoder_linears
from qvl_runtime.formats.zero_points import zero_point_notes
from qvl_runtime.weights.checkpoint import load_state
from qvl_runtime.weights.loader import load_weights
from qvl_runtime.weights.manifest import Manifest
from tests.checkpoints import MakeState, Write
from tests.formats.test_gptq import dequantize
from tests.gptq_checkpoints import quantized

NANO_INT4 = Path(qvl_runtime.__file__).parent / "nano_int4"
CPU = torch.device("cpu")
QKV = "transformer.h.1.attn.c_attn"
ONES = {4: 0x11111111, 8: 0x01010101}  # one in each field of a word


def weights_of(folder: Path, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The weight of each decoder linear, from the formula of the format alone."""
    state = load_state(folder, config, torch.float32)
    assert config.quantization is not None
    return {
        name: dequantize(GPTQLinear.from_state(state, name, config.quantization)) for name in decoder_linears(config)
    }


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("stored", "labeled"), [("gptq_v2", "gptq"), ("gptq", "gptq_v2")])
def test_symmetric_zero_points_decide_over_the_label(  # vllm#38966, vllm#26092
    raw: dict[str, Any],
    make_state: MakeState,
    write: Write,
    caplog: pytest.LogCaptureFixture,
    bits: int,
    stored: str,
    labeled: str,
) -> None:
    state = quantized(raw, make_state, bits, stored=stored)
    folder = write(raw, state)
    right = weights_of(folder, ModelConfig.from_folder(folder))
    raw["quantization_config"]["checkpoint_format"] = labeled
    (folder / "config.json").write_text(json.dumps(raw))
    config = ModelConfig.from_folder(folder)
    found = weights_of(folder, config)
    assert all(torch.equal(found[name], right[name]) for name in right)
    with caplog.at_level(logging.WARNING):
        notes = load_weights(folder, config, torch.float32, CPU).notes
    middle = 2 ** (bits - 1) - (stored == "gptq")
    assert len(notes) == 1 and all(
        word in notes[0] for word in (f"as {middle}", repr(stored), repr(labeled), "10 of 10")
    )
    assert [record.message for record in caplog.records] == list(notes), "said once"


def test_right_labels_are_not_remarked_on(raw: dict[str, Any], make_state: MakeState, write: Write) -> None:
    for bits, sym, stored in ((4, True, "gptq"), (4, False, "gptq_v2"), (8, False, "gptq"), (8, True, "gptq_v2")):
        fresh = json.loads(json.dumps(raw))
        state = quantized(fresh, make_state, bits, sym, stored)
        assert zero_point_notes(state, ModelConfig.from_dict(fresh)) == [], (bits, sym, stored)


def test_each_linear_is_read_as_it_is_stored(raw: dict[str, Any], make_state: MakeState, write: Write) -> None:
    """A checkpoint put together from two: w1 in one format and w2 in the other are not merged, and both are right."""
    state = quantized(raw, make_state)
    config = ModelConfig.from_dict(raw)
    assert config.quantization is not None
    right = {
        name: dequantize(GPTQLinear.from_state(state, name, config.quantization)) for name in decoder_linears(config)
    }
    for name in decoder_linears(config):
        if name.endswith("w2"):
            state[f"{name}.qzeros"] += ONES[4]
    folder = write(raw, state)
    found = weights_of(folder, config)
    assert all(torch.equal(found[name], right[name]) for name in right)
    weights = load_weights(folder, config, torch.float32, CPU)
    assert "transformer.h.0.mlp.w1" in weights.packed and "transformer.h.0.mlp.up_gate" not in weights.packed
    assert "2 of 10" in weights.notes[0]


@pytest.mark.parametrize(
    ("bits", "value", "words"),
    [
        (4, 9, "9 for group 1 of output 3"),
        (4, 0, "0 for group 1 of output 3"),
        (4, 8, "both 7 and 8"),
        (8, 120, "120 for group 1 of output 3"),
    ],
)
def test_zero_points_that_are_not_symmetric_are_refused_by_name(
    raw: dict[str, Any], make_state: MakeState, write: Write, bits: int, value: int, words: str
) -> None:
    state = quantized(raw, make_state, bits)
    zeros, shift = state[f"{QKV}.qzeros"], 3 * bits % 32
    word = int(zeros[1, 3 * bits // 32]) & ~((2**bits - 1) << shift) | value << shift
    zeros[1, 3 * bits // 32] = word - (1 << 32) if word >> 31 else word
    folder = write(raw, state)
    for load in (
        lambda: load_weights(folder, ModelConfig.from_folder(folder), torch.float32, CPU),
        lambda: convert(folder, folder.parent / "converted"),
    ):
        with pytest.raises(CheckpointError) as caught:
            load()
        assert all(part in str(caught.value) for part in (f"{QKV}.qzeros", words, "set sym to false"))
    assert not (folder.parent / "converted").exists()


def test_asymmetric_zero_points_keep_their_label_and_are_remarked_on(
    raw: dict[str, Any], make_state: MakeState, caplog: pytest.LogCaptureFixture
) -> None:
    """No single zero point tells the format; the codes around them do, so the label counts and a warning says so."""
    for bits, stored, labeled in ((4, "gptq", "gptq_v2"), (4, "gptq_v2", "gptq"), (8, "gptq_v2", "gptq")):
        fresh = json.loads(json.dumps(raw))
        state = quantized(fresh, make_state, bits, False, stored)
        fresh["quantization_config"]["checkpoint_format"] = labeled
        config = ModelConfig.from_dict(fresh)
        assert config.quantization is not None
        linear = GPTQLinear.from_state(state, QKV, config.quantization)
        assert linear.zero_offset == config.quantization.zero_offset
        (note,) = zero_point_notes(state, config)
        assert f"{stored!r} and not {labeled!r}" in note


def test_act_order_does_not_hide_the_codes(raw: dict[str, Any], make_state: MakeState) -> None:
    state = quantized(raw, make_state, sym=False, stored="gptq_v2")
    config = ModelConfig.from_dict(raw)
    raw["quantization_config"] |= {"desc_act": True, "checkpoint_format": "gptq"}
    generator = torch.Generator().manual_seed(0)
    for name, (_, inputs) in decoder_linears(config).items():
        order = torch.randperm(inputs, generator=generator)
        codes = torch.stack([state[f"{name}.qweight"] >> 4 * i & 15 for i in range(8)], 1).view(inputs, -1)[order]
        packed = (codes.view(inputs // 8, 8, -1).long() << 4 * torch.arange(8)[None, :, None]).sum(1)
        state[f"{name}.qweight"] = packed.to(torch.int32)
        state[f"{name}.g_idx"] = state[f"{name}.g_idx"][order]
    assert "'gptq_v2' and not 'gptq'" in zero_point_notes(state, ModelConfig.from_dict(raw))[0]


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("stored", ["gptq", "gptq_v2"])
def test_a_missing_sym_is_what_the_zero_points_say(
    raw: dict[str, Any], make_state: MakeState, sym: bool, stored: str
) -> None:
    state = quantized(raw, make_state, sym=sym, stored=stored)
    del raw["quantization_config"]["sym"], raw["quantization_config"]["checkpoint_format"]
    config = ModelConfig.from_dict(raw)
    assert config.quantization is not None and config.quantization.sym is None
    linear = GPTQLinear.from_state(state, QKV, config.quantization)
    assert linear.zero_offset == (1 if stored == "gptq" or not sym else 0)
    assert len(zero_point_notes(state, config)) == (stored == "gptq_v2")


@pytest.fixture(scope="module")
def relabeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped Int4 checkpoint with one added to every zero point, and its label left as it is."""
    folder = tmp_path_factory.mktemp("relabeled") / "nano"
    shutil.copytree(NANO_INT4, folder)
    state = load_file(folder / "model.safetensors")
    for name in state:
        if name.endswith(".qzeros"):
            state[name] += ONES[4]
    save_file(state, folder / "model.safetensors")
    return folder


def test_report_manifest_and_answers(relabeled: Path, tmp_path: Path) -> None:  # vllm#38966
    right, found = Engine(NANO_INT4, device="cpu"), Engine(relabeled, device="cpu")
    assert right.report()["model"]["notes"] == []
    (note,) = found.report()["model"]["notes"]
    assert "'gptq_v2' and not 'gptq'" in note
    assert convert(relabeled, tmp_path / "converted").notes == [note]
    assert Manifest.read(tmp_path / "converted").notes == [note]
    converted = Engine(tmp_path / "converted", device="cpu")
    assert converted.report()["model"]["notes"] == [note]
    greedy = SamplingParams(temperature=0, max_tokens=8)
    answers = [engine.generate("What is a cat?", greedy)[0].token_ids for engine in (right, found, converted)]
    assert answers[0] == answers[1] == answers[2]
    restore(tmp_path / "converted", tmp_path / "again")
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == (relabeled / "model.safetensors").read_bytes()


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("stored", ["gptq", "gptq_v2"])
def test_two_files_that_disagree(
    raw: dict[str, Any], make_state: MakeState, write: Write, sym: bool, stored: str
) -> None:
    """Optimum 2.3 writes one format into config.json and the other into quantize_config.json: the data tell."""
    state = quantized(raw, make_state, sym=sym, stored=stored)
    folder = write(raw, state)
    right = weights_of(folder, ModelConfig.from_folder(folder))
    for one, other in (FORMATS, FORMATS[::-1]):
        section = raw["quantization_config"]
        (folder / "quantize_config.json").write_text(json.dumps({**section, "checkpoint_format": one}))
        section["checkpoint_format"] = other
        (folder / "config.json").write_text(json.dumps(raw))
        found = weights_of(folder, ModelConfig.from_folder(folder))
        assert all(torch.equal(found[name], right[name]) for name in right)
        (note,) = load_weights(folder, ModelConfig.from_folder(folder), torch.float32, CPU).notes
        assert "disagree" in note and note.endswith(repr(stored))


def test_codes_that_tell_nothing_are_refused(raw: dict[str, Any], make_state: MakeState, write: Write) -> None:
    state = quantized(raw, make_state, sym=False)
    for name in state:
        if name.endswith(".qweight"):
            state[name].fill_(0)
    file = {**raw["quantization_config"], "checkpoint_format": "gptq_v2"}
    folder = write(raw, state)
    (folder / "quantize_config.json").write_text(json.dumps(file))
    with pytest.raises(CheckpointError, match=r"do not tell which is right.*correct one of the two"):
        load_weights(folder, ModelConfig.from_folder(folder), torch.float32, CPU)


def test_a_file_completes_the_section(raw: dict[str, Any]) -> None:
    """The section lacks the format: quantize_config.json has it."""
    section: dict[str, Any] = {"bits": 4, "group_size": 64, "sym": False}
    raw["quantization_config"] = section
    config = ModelConfig.from_dict(raw, {**section, "checkpoint_format": "gptq_v2"})
    assert config.quantization == QuantizationConfig(4, 64, sym=False, checkpoint_format="gptq_v2")
