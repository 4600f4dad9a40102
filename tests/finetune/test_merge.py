"""Merging: each weight rounded exactly once, the same answers, and what cannot be merged names the way out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.engine.engine import NANO
from qvl_runtime.errors import CheckpointError, ConfigError
from qvl_runtime.finetune.merge import merge, write_float
from qvl_runtime.finetune.probe import answer_logits, distance, probe_samples
from qvl_runtime.finetune.requantize import requantize
from qvl_runtime.formats.adapter import Adapter, AdapterConfig, Side, linears_of
from qvl_runtime.formats.gptq import GPTQLinear
from qvl_runtime.weights.adapter import write_adapter
from qvl_runtime.weights.checkpoint import Checkpoint, load_state

pytestmark = pytest.mark.cpu
NANO_INT4 = NANO.with_name("nano_int4")
CONFIG = ModelConfig.from_folder(NANO)


def adapter(saved: bool = False) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    targets = ("c_attn", "w1", "w2", "attn.in_proj") if saved else ("c_attn", "w1", "w2")
    config = AdapterConfig(r=4, lora_alpha=4, target_modules=targets, modules_to_save=("lm_head",) if saved else ())
    sides = {
        name: Side(torch.randn(4, inputs, generator=generator), torch.randn(outputs, 4, generator=generator) * 0.003)
        for name, (outputs, inputs) in linears_of(CONFIG).items()
        if name.endswith(targets)
    }
    head = torch.randn(CONFIG.vocab_size, CONFIG.hidden_size, generator=generator) * 0.05
    return Adapter(config, sides, {"lm_head": head} if saved else {})


@pytest.fixture(params=[False, True], ids=["decoder", "more"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Adapter]:
    folder, own = tmp_path / "adapter", adapter(request.param)
    folder.mkdir()
    write_adapter(folder, own, CONFIG)
    return folder, own


def test_each_weight_is_rounded_exactly_once(written: tuple[Path, Adapter], tmp_path: Path) -> None:
    folder, own = written
    change = merge(NANO, folder, tmp_path / "merged")
    before, after = (Checkpoint.open(path, CONFIG) for path in (NANO, tmp_path / "merged"))
    assert list(after.names) == list(before.names) or set(after.names) == set(before.names)
    for name in before.names:
        module, stored = name.removesuffix(".weight"), before.tensor(name)
        wanted = stored
        if module in own.sides:
            exact = stored.double() + own.config.scale * (own.sides[module].b.double() @ own.sides[module].a.double())
            error = (after.tensor(name).double() - exact).abs()
            half_a_bit = exact.abs().clamp(min=1e-30).log2().floor().exp2() / 256  # bfloat16: 8 significant bits
            in_float32 = 1e-6 * stored.double().abs() + 1e-9  # of the sum, where it cancels
            assert (error <= half_a_bit + in_float32).all(), name
            continue
        if module in own.saved:
            wanted = own.saved[module].bfloat16()
        assert after.tensor(name).dtype == stored.dtype and torch.equal(after.tensor(name), wanted), name
    assert change.linears == len(own.sides) and change.replaced == len(own.saved)
    assert change.largest > change.mean > 0 and change.unchanged < 0.9


def test_the_result_predicts_what_base_and_adapter_do(written: tuple[Path, Adapter], tmp_path: Path) -> None:
    folder, own = written
    merge(NANO, folder, tmp_path / "merged")
    samples = probe_samples(NANO, None)
    reference = answer_logits(NANO, samples, own)
    apart = distance(reference, answer_logits(tmp_path / "merged", samples))
    base = distance(reference, answer_logits(NANO, samples))
    assert apart.kl < 0.02 and apart.kl < base.kl / 10 and apart.agreement > 0.95


def test_distance_is_zero_for_the_same_and_grows() -> None:
    logits = [torch.randn(5, 7), torch.randn(2, 7)]
    assert distance(logits, logits) == (0.0, 0.0, 1.0)
    apart = distance(logits, [each + torch.arange(7) for each in logits])
    assert apart.kl > 0.1 and apart.largest == pytest.approx(6, abs=1e-5)


def test_an_int4_base_is_refused_with_the_ways_out(written: tuple[Path, Adapter], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapters=.*float checkpoint.*--requantize"):
        merge(NANO_INT4, written[0], tmp_path / "merged")
    with pytest.raises(ConfigError, match="without --requantize"):
        requantize(NANO, written[0], tmp_path / "merged", None)
    (tmp_path / "merged").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        merge(NANO, written[0], tmp_path / "merged")


def test_int4_dequantized_with_the_adapter_is_their_sum(written: tuple[Path, Adapter], tmp_path: Path) -> None:
    _, own = written
    write_float(NANO_INT4, own, tmp_path / "float")
    config = ModelConfig.from_folder(tmp_path / "float")
    assert config.quantization is None and config.dtype == "bfloat16"
    state = load_state(tmp_path / "float", config, torch.float32)
    packed, quantized = Checkpoint.open(NANO_INT4), ModelConfig.from_folder(NANO_INT4)
    name = "transformer.h.1.mlp.w2"
    assert quantized.quantization is not None
    linear = GPTQLinear.from_state(packed, name, quantized.quantization)
    from qvl_kernels.reference import gptq_dequantize

    dense = gptq_dequantize(linear.qweight, linear.qzeros, linear.scales, linear.g_idx, linear.bits, linear.zero_offset)
    wanted = dense + own.config.scale * own.sides[name].b @ own.sides[name].a
    torch.testing.assert_close(state[f"{name}.weight"], wanted.bfloat16().float())


def test_requantized_int4_is_nearer_than_no_adapter(tmp_path: Path) -> None:
    folder, own = tmp_path / "adapter", adapter()
    strong = own._replace(config=replace(own.config, lora_alpha=16))
    folder.mkdir()
    write_adapter(folder, strong, CONFIG)
    result = requantize(NANO_INT4, folder, tmp_path / "int4", None, samples=8)
    config = ModelConfig.from_folder(tmp_path / "int4")
    assert config.quantization == ModelConfig.from_folder(NANO_INT4).quantization
    assert 0 < result.requantized.kl < result.without.kl / 3
    assert not list(tmp_path.glob(".int4*")), "the float sum is removed"
