"""A whole quantization: the published layout, what it is calibrated on, and what the model then computes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from qvl_runtime import Engine, SamplingParams
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.errors import PromptError
from qvl_runtime.quantize import quantizer as quantize
from qvl_runtime.quantize.calibration import _cut
from qvl_runtime.quantize.options import QuantizeOptions
from qvl_runtime.quantize.quantizer import Quantizer
from qvl_runtime.weights.checkpoint import load_state
from tests.gptq_checkpoints import quantize_state
from tests.quantize.quantized import FEW, digest, run

pytestmark = pytest.mark.cpu
ROUNDING = 2**10 * torch.finfo(torch.float32).eps  # sums of 384 numbers in another order, through two layers and a head


def test_the_result_is_a_published_checkpoint(source: Path, whole: Path) -> None:
    config = ModelConfig.from_folder(whole)
    assert config.quantization == FEW.quantization and config.dtype == "float16"
    state = load_state(whole, config, torch.float16)
    assert {f"transformer.h.1.mlp.w1.{kind}" for kind in ("qweight", "qzeros", "scales", "g_idx", "bias")} <= set(state)
    assert {tensor.dtype for name, tensor in state.items() if name.endswith(("weight", "scales", "bias"))} <= {
        torch.float16,
        torch.int32,
    }
    before = load_file(source / "model.safetensors")
    for name in ("transformer.wte.weight", "transformer.visual.proj", "transformer.h.0.ln_1.weight", "lm_head.weight"):
        assert torch.equal(state[name], before[name].half())
    assert sorted(digest(whole)) == [
        "config.json",
        "model.safetensors",
        "quantize_config.json",
        "quantize_report.json",
        "qwen.tiktoken",
    ]
    assert not [path for path in whole.parent.iterdir() if path.name.endswith(".partial")]
    engine = Engine(whole, dtype="float32")
    assert len(engine.generate(["Hello"], SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids) == 4


def test_each_linear_beats_rounding_to_nearest_on_conversations_it_has_not_seen(whole: Path) -> None:
    report = json.loads((whole / "quantize_report.json").read_text())
    assert [(e["layer"], e["linear"]) for e in report["linears"]] == [
        (layer, name) for layer in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
    ]
    assert all(0 < e["error"] < 0.9 * e["rtn_error"] for e in report["linears"])
    assert report["calibration"]["held_out"] == 1


def test_blocks_are_calibrated_on_what_the_quantized_model_computes(source: Path, tmp_path: Path) -> None:
    """The residual streams that the quantizer ends with are those of both models on the same conversations."""
    quantizer = Quantizer.open(source, tmp_path / "out", FEW)
    seen: list[torch.Tensor] = []
    original = quantize.quantize_block  # type: ignore[attr-defined]

    def watched(*arguments: Any) -> torch.Tensor:
        seen.append(original(*arguments))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "quantize_block", watched)
        quantizer.run()
    for folder, stream in zip((tmp_path / "out", source), seen[-1], strict=True):
        engine, start = Engine(folder, dtype="float32"), 0
        for sample in quantizer.calibration.samples:
            rows = stream[start : start + len(sample.token_ids)]
            start += len(rows)
            images = [image.original for _, image in sample.images]
            found = engine.score({"token_ids": sample.token_ids, "images": images}, return_logits=True).logits
            decoder = engine.core.runner.model.decoder
            expected = decoder.logits(decoder._ops.rms_norm(rows, decoder._ln_f, decoder._eps))
            assert found is not None
            assert (found - expected).abs().max() <= ROUNDING * expected.abs().max()


def test_without_drift_the_float_models_rows_are_not_followed(source: Path, tmp_path: Path) -> None:
    plain = replace(FEW, drift=0.0)
    assert (FEW.streams, plain.streams, replace(FEW, method="rtn").streams) == (2, 1, 1)
    two, one = (Quantizer.open(source, tmp_path / "out", options).estimate() for options in (FEW, plain))
    assert two.memory > one.memory and two.disk > one.disk
    run(source, tmp_path / "out", plain)
    report = json.loads((tmp_path / "out" / "quantize_report.json").read_text())
    assert report["options"]["drift"] == 0 and all(0 < e["error"] < 0.9 * e["rtn_error"] for e in report["linears"])


def test_round_to_nearest_is_what_it_was(source: Path, tmp_path: Path) -> None:
    quantizer = run(source, tmp_path / "rtn", replace(FEW, method="rtn"))
    config = ModelConfig.from_folder(source)
    expected = quantize_state(load_state(source, config, torch.float32), config, quantizer.options.quantization)
    found = load_file(tmp_path / "rtn" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    "options",
    [replace(FEW, order="full"), replace(FEW, group_size=-1, sym=False), replace(FEW, bits=8, group_size=128)],
    ids=["full-order", "asym-one-group", "int8"],
)
def test_every_kind_loads_and_says_what_it_is(options: QuantizeOptions, source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out", options)
    config = ModelConfig.from_folder(tmp_path / "out")
    assert config.quantization == options.quantization
    assert config.quantization.desc_act is (options.order == "full")
    Engine(tmp_path / "out", dtype="float32").score("Hello")


def test_big_models_come_in_shards_with_an_index(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "SHARD", 200_000)
    run(source, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    config = ModelConfig.from_folder(whole)
    one, other = (load_state(folder, config, torch.float16) for folder in (whole, tmp_path / "out"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    sizes = [tensor.nbytes for name, tensor in load_file(whole / "model.safetensors").items()]
    assert index["metadata"]["total_size"] == sum(sizes)


def test_no_more_than_one_layer_is_mapped(source: Path, tmp_path: Path) -> None:
    quantizer = Quantizer.open(source, tmp_path / "out", FEW)
    held = quantizer._block_quantizer(1, calibration_batch(quantizer), lambda done: None).state
    assert {name.split(".")[2] for name in held} == {"1"}


def calibration_batch(quantizer: Quantizer) -> Any:
    c = quantizer.calibration
    return quantize.CalibrationBatch.of(quantizer.config, c.lengths, c.held_out, torch.device("cpu"))  # type: ignore[attr-defined]


def test_a_file_of_conversations_is_calibrated_on(source: Path, tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    records = [
        {
            "id": str(number),
            "conversations": [
                {"from": "user", "value": f"Picture 1: <img>a.png</img>\n{number}?"},
                {"from": "assistant", "value": "word " * 40},
            ],
        }
        for number in range(4)
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    options = replace(FEW, samples=3, max_tokens=100)
    quantizer = run(source, tmp_path / "out", options, calibration=tmp_path / "data.json")
    estimate = quantizer.estimate()
    assert (estimate.conversations, estimate.shortened, estimate.tokens) == (3, 3, 300)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert "transformer.h.0.attn.c_attn.qweight" in file.keys()  # noqa: SIM118 - not a dict
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(PromptError, match=r"data.json line 1 \(record \d\): image 1 .*a.png"):
        Quantizer.open(source, tmp_path / "again", options, calibration=tmp_path / "data.json")


@pytest.mark.parametrize(
    ("limit", "kept"), [(3, 3), (9, 9), (10, 9), (14, 9), (15, 15), (20, 19), (24, 19), (25, 25), (30, 30), (50, 30)]
)
def test_a_conversation_is_never_cut_inside_an_image(limit: int, kept: int) -> None:
    # <img> at 9, four pads from 10, </img> at 14; and again from 19
    assert _cut([10, 20], 4, 30, limit) == kept
