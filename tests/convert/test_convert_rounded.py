"""Vision encoders and heads rounded by a conversion, to the same codes for every target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.convert.convert import ConvertOptions, convert
from qvl_runtime.errors import ConfigError
from qvl_runtime.weights.converted import Converted
from qvl_runtime.weights.loader import load_weights
from tests.checkpoints import MakeState, Write

pytestmark = pytest.mark.cpu


def test_rounded_vision_and_head(raw: dict[str, Any], make_state: MakeState, write: Write, tmp_path: Path) -> None:
    state = make_state(ModelConfig.from_dict(raw))
    source = write(raw, state)
    manifest = convert(source, tmp_path / "small", ConvertOptions(vision="int8", head="int4"))
    assert manifest.linears["lm_head"].fields["bits"] == 4 and "lm_head.weight" not in manifest.state
    blocks = [name for name in manifest.linears if "resblocks.0" in name]
    assert len(blocks) == 4 and all(manifest.linears[name].fields["bits"] == 8 for name in blocks)
    from qvl_kernels.cpu import linears as cpu_linear

    weights = load_weights(tmp_path / "small", ModelConfig.from_folder(source), torch.float32, torch.device("cpu"))
    for name, bits in [("lm_head", 4), (blocks[0], 8)]:
        weight, x = state[f"{name}.weight"], torch.eye(state[f"{name}.weight"].shape[1])
        y = cpu_linear.bind(weights.packed[name])(x) - state.get(f"{name}.bias", torch.zeros(len(weight)))
        step = (weight.amax(1) - weight.amin(1)).max() / (2**bits - 1) * (2 if bits == 8 else 1)
        assert (y.t() - weight).abs().max() <= step * 0.6  # half a step of the group, and float16 scales


@pytest.mark.parametrize("head", ["int4", "int8"])
def test_both_targets_round_to_the_same_codes(int4: Path, tmp_path: Path, head: str) -> None:
    from qvl_kernels import packing_for

    codes: dict[str, dict[str, torch.Tensor]] = {}
    for target in ("cpu", "cuda"):
        options = ConvertOptions(target=target, vision="int8", head=head)
        manifest = convert(int4, tmp_path / target, options)
        converted = Converted.open(tmp_path / target)
        codes[target] = {
            name: packing_for(target).unpack_to_qweight(converted.linear(name)) for name in manifest.linears
        }
    assert codes["cpu"].keys() == codes["cuda"].keys()
    assert all(torch.equal(found, codes["cuda"][name]) for name, found in codes["cpu"].items())
    kinds = {name: linear.layout for name, linear in manifest.linears.items() if linear.rounded}
    assert kinds.pop("lm_head") == {"int4": "gpu-1", "int8": "gpu-int8-1"}[head]
    assert len(kinds) > 4 and set(kinds.values()) == {"gpu-int8-1"}


def test_what_has_no_kernel_is_not_rounded(int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qvl_kernels import reference

    monkeypatch.setattr("qvl_kernels.layouts.repack.pack_gptq", reference.pack_gptq)
    with pytest.raises(ConfigError, match=r"no kernel for transformer.visual.* in 8 bits: keep its floats"):
        convert(int4, tmp_path / "new", ConvertOptions(target="cuda", vision="int8"))
