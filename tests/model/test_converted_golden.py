"""Converted checkpoints answer what the original answers, and bit for bit what the published files do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qvl_kernels.cpu import linears as cpu_linear
from qvl_kernels.layouts import repack
from qvl_runtime.config.quantization import QuantizationConfig
from qvl_runtime.convert.convert import ConvertOptions, convert
from qvl_runtime.formats.gptq import GPTQLinear
from qvl_runtime.schedule.runner import Chunk
from qvl_runtime.weights.checkpoint import load_state
from qvl_runtime.weights.converted import Converted
from tests.model.oracle import LOGITS, Oracle, close

pytestmark = pytest.mark.cpu

LAYERS = ("g128_sym", "g64_sym", "gall_sym", "g128_asym", "g64_asym", "gall_asym")
LAYERS += ("g128_sym_actorder", "g64_asym_actorder", "b8_g128_sym", "b8_g64_asym_actorder")  # type: ignore[assignment]


@pytest.fixture(scope="module")
def converted(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both tiny checkpoints, laid out for the CPU."""
    home = tmp_path_factory.mktemp("converted")
    folders = {}
    for name in ("tiny", "tiny-int4"):
        folders[name] = home / name
        convert(golden / name, folders[name], ConvertOptions(target="cpu"))
    return folders


def test_tiny(tiny: Oracle, golden: Path, converted: dict[str, Path]) -> None:
    ours = Oracle(golden, "tiny", folder=converted["tiny"])
    text = load_file(golden / "lm_i_text20.safetensors")
    close(ours.prefill(text["ids"][0].tolist())[0], text["logits"][0], LOGITS, "logits")
    image = load_file(golden / "lm_ii_one_image.safetensors")
    ids = image["ids"][0].tolist()
    logits = ours.prefill(ids)[0]
    close(logits[image["logits_positions"]], image["logits"][0], LOGITS, "logits")
    assert torch.equal(logits, tiny.prefill(ids)[0])


def test_tiny_int4(tiny_int4: Oracle, golden: Path, converted: dict[str, Path]) -> None:
    ours, want = Oracle(golden, "tiny-int4", folder=converted["tiny-int4"]), load_file(golden / "lm_int4.safetensors")
    text = want["i_ids"][0].tolist()
    close(ours.prefill(text)[0], want["i_logits"][0], LOGITS, "logits")
    assert torch.equal(ours.prefill(text)[0], tiny_int4.prefill(text)[0])
    assert ours.model.bytes_by_part == tiny_int4.model.bytes_by_part and ours.model.kernels == tiny_int4.model.kernels
    chunk, made = ours.chunk(want["ii_ids"][0].tolist()), []
    with chunk.sequence as sequence:
        for _ in range(32):
            logits = ours.model.logits(ours.runner.run([chunk])[-1:])
            made.append(int(logits.argmax()))
            chunk = Chunk(sequence, made[-1:])
    assert made == want["ii_greedy32"].tolist()


def test_tiny_int4_for_cuda(tiny_int4: Oracle, golden: Path, tmp_path: Path) -> None:
    """The GPU's layout read back into plain torch: the weights of every linear, to the bit."""
    manifest = convert(golden / "tiny-int4", tmp_path / "cuda", ConvertOptions(target="cuda"))
    converted = Converted.open(tmp_path / "cuda")
    state = load_state(golden / "tiny-int4", tiny_int4.config, torch.float16)
    for name, linear in manifest.linears.items():
        assert linear.layout == "gpu-1"
        back = repack.unpack_gptq(converted.linear(name)).tensors
        for kind in ("qweight", "qzeros", "scales"):
            assert torch.equal(back[kind], torch.cat([state[f"{part}.{kind}"] for part in linear.parts], 1))


@pytest.mark.parametrize("case", LAYERS)
def test_layers(golden: Path, case: str) -> None:
    """Symmetric or not, act-order or not, one group or many, 4 and 8 bits: packed, bound, and unpacked again."""
    tensors = load_file(golden / "gptq_layers.safetensors")
    settings = json.loads((golden / "gptq_layers.json").read_text(encoding="utf-8"))[case]
    kind = QuantizationConfig(**{key: settings[key] for key in ("bits", "group_size", "sym", "desc_act")})
    w = GPTQLinear.from_state(tensors, case, kind)
    packed = cpu_linear.pack_gptq(w.qweight, w.qzeros, w.scales, w.g_idx, w.bits, w.zero_offset, w.bias)
    assert packed.layout == cpu_linear.LAYOUT
    torch.testing.assert_close(cpu_linear.bind(packed)(tensors["x"]), tensors[f"{case}.y"], atol=1e-5, rtol=0)
    assert torch.equal(cpu_linear.unpack_to_qweight(packed), w.qweight)
