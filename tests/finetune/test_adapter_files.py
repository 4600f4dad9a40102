"""Adapters in peft's files: what peft writes we read, what we write peft reads, and what does not fit is refused."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.engine.engine import NANO
from qvl_runtime.errors import CheckpointError, ConfigError
from qvl_runtime.finetune.functions import Documents
from qvl_runtime.finetune.lora import adapter_of, load_adapter
from qvl_runtime.finetune.network import Network
from qvl_runtime.formats.adapter import AdapterConfig
from qvl_runtime.weights.adapter import read_adapter, write_adapter
from tests.finetune.small import learner

pytestmark = pytest.mark.cpu
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft: pip install peft")
KINDS = {
    "plain": AdapterConfig(r=4, lora_dropout=0.0),
    "rslora": AdapterConfig(r=4, lora_dropout=0.0, use_rslora=True, target_modules=("c_attn", "mlp.c_proj")),
    "saved": AdapterConfig(r=4, lora_dropout=0.0, modules_to_save=("wte", "lm_head")),
}


class StandIn(nn.Module):
    """The network as peft sees a model: linears by their published names, ids in, logits out."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.transformer, self.lm_head = network.transformer, network.lm_head
        self._network = [network]

    def forward(self, ids: Tensor) -> Tensor:
        network, n = self._network[0], ids.shape[1]
        hidden = network.decode(self.transformer["wte"](ids), torch.arange(n)[None], Documents((0, n)))
        assert self.lm_head is not None
        out: Tensor = self.lm_head(hidden)
        return out

    def prepare_inputs_for_generation(self) -> None:
        """Peft looks for it in a model that generates."""


def plain_linears(module: nn.Module) -> None:
    """Replace our linears by torch's, which peft knows."""
    from qvl_runtime.finetune.linears import Linear

    for name, child in module.named_children():
        if isinstance(child, Linear):
            with torch.device("meta"):
                made = nn.Linear(child.in_features, child.out_features, child.bias is not None)
            made.weight, made.bias = child.weight, child.bias  # type: ignore[assignment]
            setattr(module, name, made)
        else:
            plain_linears(child)


def trained(folder: Path, config: AdapterConfig) -> Network:
    """A network whose side paths and saved modules are not what they start as."""
    network = learner(folder, lora=config).network
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return network


def logits(network: Network) -> Tensor:
    network.eval()
    with torch.no_grad():
        out: Tensor = StandIn(network)(torch.arange(20)[None] * 7)
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_read_as_it_was_written(kind: str, source: Path, tmp_path: Path) -> None:
    network = trained(source, KINDS[kind])
    write_adapter(tmp_path, adapter_of(network, KINDS[kind]), network.c)
    fresh = learner(source, method="full").network
    load_adapter(fresh, read_adapter(tmp_path, network.c))
    assert torch.equal(logits(fresh), logits(network))
    assert str(source) not in (tmp_path / "adapter_config.json").read_text()


@needs_peft
@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_ours(kind: str, source: Path, tmp_path: Path) -> None:
    import peft

    network = trained(source, KINDS[kind])
    wanted = logits(network)
    write_adapter(tmp_path, adapter_of(network, KINDS[kind]), network.c)
    base = learner(source, method="full").network
    plain_linears(base)
    model = peft.PeftModel.from_pretrained(StandIn(base), str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model.base_model.model(torch.arange(20)[None] * 7), wanted)


@needs_peft
@pytest.mark.parametrize("kind", KINDS)
def test_we_read_pefts(kind: str, source: Path, tmp_path: Path) -> None:
    import peft

    own = KINDS[kind]
    base = learner(source, method="full").network
    plain_linears(base)
    config = peft.LoraConfig(
        r=own.r, lora_alpha=own.lora_alpha, target_modules=list(own.target_modules), use_rslora=own.use_rslora,
        modules_to_save=list(own.modules_to_save) or None, init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = peft.get_peft_model(StandIn(base), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        wanted = model(torch.arange(20)[None] * 7)
    model.save_pretrained(str(tmp_path))
    fresh = learner(source, method="full").network
    load_adapter(fresh, read_adapter(tmp_path, fresh.c))
    torch.testing.assert_close(logits(fresh), wanted)


@pytest.fixture
def written(source: Path, tmp_path: Path) -> Path:
    network = trained(source, KINDS["plain"])
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_adapter(folder, adapter_of(network, KINDS["plain"]), network.c)
    return folder


def test_an_old_bin_file_is_read(source: Path, written: Path) -> None:
    config = ModelConfig.from_folder(source)
    first = read_adapter(written, config)
    torch.save(load_file(written / "adapter_model.safetensors"), written / "adapter_model.bin")
    (written / "adapter_model.safetensors").unlink()
    second = read_adapter(written, config)
    assert all(torch.equal(side.a, second.sides[name].a) for name, side in first.sides.items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"w1": 8}}, "rank_pattern"),
        ({"bias": "all"}, "bias"),
        ({"target_modules": "all-linear"}, "target_modules"),
        ({"r": 0}, "rank r is 0"),
        ({"lora_alpha": "many"}, "lora_alpha"),
    ],
)
def test_features_that_are_not_supported_are_named(
    change: dict[str, Any], words: str, source: Path, written: Path
) -> None:
    path = written / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=words):
        read_adapter(written, ModelConfig.from_folder(source))


def test_an_adapter_of_another_base_is_refused(source: Path, written: Path) -> None:
    config = ModelConfig.from_folder(source)
    with pytest.raises(CheckpointError, match=r"other sizes"):
        read_adapter(written, ModelConfig.from_folder(NANO))
    (written / "qvl_adapter.json").unlink()
    with pytest.raises(CheckpointError, match=r"lora_A.*expected \(4, 256\)"):
        read_adapter(written, ModelConfig.from_folder(NANO))
    tensors = load_file(written / "adapter_model.safetensors")
    name = next(iter(tensors))
    for changed, words in (
        ({key: value for key, value in tensors.items() if key != name}, "alone"),
        ({**tensors, "base_model.model.model.layers.0.q_proj.lora_A.weight": tensors[name].clone()}, "no place for"),
        ({**tensors, name: tensors[name] * torch.nan}, "NaN"),
        ({}, "no LoRA weight"),
    ):
        save_file(changed, written / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=words):
            read_adapter(written, config)
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        read_adapter(source, config)


def test_a_module_that_cannot_be_saved_is_named(source: Path) -> None:
    with pytest.raises(ConfigError, match="'visual'; supported are wte"):
        learner(source, lora=replace(KINDS["saved"], modules_to_save=("visual",)))
