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
from qvl_runtime.config.quantization import QuantizationConfig
from qvl_runtime.convert.convert import convert
from qvl_runtime.convert.restore import restore
from qvl_runtime.errors import CheckpointError, ConfigError
from qvl_runtime.formats.gptq import GPTQLinear
from qvl_runtime.formats.layout import decoder_linears
from qvl_runtime.formats.zero_points import zero_point_notes
from qvl_runtime.weights.checkpoint import load_state
from qvl_runtime.weights.loader import load_weights
from qvl_runtime.weights.manifest import Manifest
from tests.checkpoints import MakeState, Write
from tests.formats.test_gptq import dequantize
from tests.gptq_checkpoints import quantize_state
from tests.weights.faults import fails

NANO_INT4 = Path(qvl_runtime.__file__).parent / "nano_int4"
CPU = torch.device("cpu")
QKV = "transformer.h.1.attn.c_attn"
State = dict[str, torch.Tensor]
LABELED = {"sym": True, "desc_act": False, "quant_method": "gptq"}
ONES = {4: 0x11111111, 8: 0x01010101}  # one in each field of a word


def quantized(
    raw: dict[str, Any], make_state: MakeState, bits: int = 4, sym: bool = True, stored: str = "gptq"
) -> State:
    """A rounded state; `stored`: the format that its zero points really have."""
    config = ModelConfig.from_dict(raw)
    section = {**LABELED, "bits": bits, "group_size": 64, "sym": sym, "checkpoint_format": stored}
    raw["quantization_config"] = section
    return quantize_state(make_state(config), config, QuantizationConfig.from_dict(section))


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


@pytest.mark.parametrize("group", [0, 1])
def test_g_idx_must_fill_its_groups(raw: dict[str, Any], make_state: MakeState, write: Write, group: int) -> None:
    """An index that was never written is zero everywhere: one group of all inputs, while there are scales for two."""
    state = quantized(raw, make_state)
    raw["quantization_config"]["desc_act"] = True
    state[f"{QKV}.g_idx"] = torch.full((128,), group, dtype=torch.int32)
    with pytest.raises(CheckpointError, match=rf"{QKV}\.g_idx gives group 0 {128 * (1 - group)} inputs; expected 64"):
        load_weights(write(raw, state), ModelConfig.from_dict(raw), torch.float32, CPU)


def test_g_idx_of_64_bits(raw: dict[str, Any], make_state: MakeState, write: Write, tmp_path: Path) -> None:
    state = quantized(raw, make_state)
    right = load_weights(write(raw, state), ModelConfig.from_dict(raw), torch.float32, CPU)
    (tmp_path / "model").rename(tmp_path / "narrow")
    wide = {name: tensor.long() if name.endswith("g_idx") else tensor for name, tensor in state.items()}
    found = load_weights(write(raw, wide), ModelConfig.from_dict(raw), torch.float32, CPU)
    for name, packed in right.packed.items():
        assert all(torch.equal(tensor, found.packed[name].tensors[kind]) for kind, tensor in packed.tensors.items())


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ({"bits": 8}, "of 4 bits in groups of 64 inputs, and the configuration says 8 bits in groups of 64"),
        ({"group_size": 32}, "of 4 bits in groups of 64 inputs, and the configuration says 4 bits in groups of 32"),
        ({"bits": 8, "group_size": -1}, "says 8 bits in groups of -1"),
    ],
)
def test_shapes_tell_bits_and_groups(
    raw: dict[str, Any], make_state: MakeState, write: Write, label: dict[str, int], words: str
) -> None:
    state = quantized(raw, make_state)
    raw["quantization_config"] |= label
    fails(write(raw, state), ModelConfig.from_dict(raw), words)


@pytest.mark.parametrize("dynamic", [{"-:.*visual.*": {}}, {"-:lm_head": {}}, {"+:.*c_attn": {"bits": 4}}, {}, None])
def test_rules_that_change_nothing_are_accepted(  # vllm#25029
    raw: dict[str, Any], make_state: MakeState, write: Write, dynamic: Any
) -> None:
    state = quantized(raw, make_state)
    raw["quantization_config"]["dynamic"] = dynamic
    load_weights(write(raw, state), ModelConfig.from_dict(raw), torch.float32, CPU)


def test_rules_that_change_a_packed_linear_are_refused_by_name(
    raw: dict[str, Any], make_state: MakeState, write: Write
) -> None:
    state = quantized(raw, make_state)
    fresh = json.loads(json.dumps(raw))
    del fresh["quantization_config"]
    state |= {name: t for name, t in quantized(fresh, make_state, 8).items() if name.startswith(QKV)}
    raw["quantization_config"]["dynamic"] = {r"+:.*\.1\.attn\.c_attn": {"bits": 8}}
    folder = write(raw, state)
    fails(folder, ModelConfig.from_dict(raw), f"{QKV}.qweight of shape", "'dynamic'")


def test_linears_that_a_rule_left_out_are_named(raw: dict[str, Any], make_state: MakeState, write: Write) -> None:
    dense = make_state(ModelConfig.from_dict(raw))
    state = quantized(raw, make_state)
    for kind in ("qweight", "qzeros", "scales", "g_idx", "bias"):
        del state[f"{QKV}.{kind}"]
    state |= {f"{QKV}.{kind}": dense[f"{QKV}.{kind}"] for kind in ("weight", "bias")}
    raw["quantization_config"]["dynamic"] = {f"-:{QKV}": {}}
    fails(write(raw, state), ModelConfig.from_dict(raw), f"{QKV}.qweight", "'dynamic'")


@pytest.mark.parametrize(
    "section",
    [
        {"bits": "4", "group_size": "64", "quant_method": "GPTQ", "sym": "true", "desc_act": "False"},
        {"bits": 4.0, "group_size": 64, "checkpoint_format": "GPTQ", "sym": True},
        {"bits": 4, "group_size": 64, "method": "gptq", "format": "gptq", "sym": True, "lm_head": "false"},
    ],
)
def test_other_spellings_of_the_same(section: dict[str, Any]) -> None:  # vllm#25029
    assert QuantizationConfig.from_dict(section) == QuantizationConfig(4, 64)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"bits": "four"}, ["bits", "'four'"]),
        ({"format": "gptq_p"}, ["'gptq_p'", "gptq_v2"]),  # GPTQModel's planar layout
        ({"format": "gptq_v2", "checkpoint_format": "gptq"}, ["'gptq'", "'gptq_v2'", "correct the wrong one"]),
        ({"method": "awq"}, ["quant_method", "'awq'"]),
        ({"rotation": "hadamard"}, ["'rotation'"]),
    ],
)
def test_other_formats_are_refused_by_name(section: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        QuantizationConfig.from_dict({"bits": 4, "group_size": 64, **section})
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_format_is_read_under_both_names() -> None:
    assert QuantizationConfig.from_dict({"bits": 4, "group_size": 64, "format": "gptq_v2"}).zero_offset == 0


@pytest.mark.parametrize("sym", [True, False])
def test_two_files_that_disagree(raw: dict[str, Any], tmp_path: Path, sym: bool) -> None:
    """The section lacks the format: quantize_config.json has it. Where both have one, only data could tell."""
    section: dict[str, Any] = {"bits": 4, "group_size": 64, "sym": sym}
    raw["quantization_config"] = section
    file = {**section, "checkpoint_format": "gptq_v2"}
    config = ModelConfig.from_dict(raw, file)
    assert config.quantization is not None and config.quantization.checkpoint_format == "gptq_v2"
    section["checkpoint_format"] = "gptq"
    if sym:
        assert ModelConfig.from_dict(raw, file).quantization == QuantizationConfig(4, 64)
    else:
        with pytest.raises(ConfigError, match=r"config\.json has checkpoint_format 'gptq' and quantize_config\.json"):
            ModelConfig.from_dict(raw, file)


def test_packed_integers_of_other_widths_say_what_to_do(
    raw: dict[str, Any], make_state: MakeState, write: Write
) -> None:
    state = quantized(raw, make_state)
    state[f"{QKV}.qweight"] = state[f"{QKV}.qweight"].to(torch.int64)
    fails(write(raw, state), ModelConfig.from_dict(raw), f"{QKV}.qweight of dtype int64", "pack_dtype")
