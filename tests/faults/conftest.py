"""Converted checkpoints, which tests change as a stranger would."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.convert.convert import ConvertOptions, convert
from qvl_runtime.formats.layout import expected_tensors
from qvl_runtime.prompt import images
from qvl_runtime.prompt.chatml import PromptEncoder
from qvl_runtime.prompt.isolation.pool import Pool
from qvl_runtime.prompt.tokenizer import Tokenizer
from tests.checkpoints import RAW
from tests.gptq_checkpoints import gptq

Copy = Callable[[str], Path]


@pytest.fixture(scope="session")
def converted_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders: `source`, of act-order Int4 in two shards; `plain`, `cuda` and `rounded`, converted from it."""
    home = tmp_path_factory.mktemp("untrusted")
    raw = json.loads(json.dumps(RAW))
    generator = torch.Generator().manual_seed(0)
    config = ModelConfig.from_dict(raw)
    state = {name: torch.randn(spec.shape, generator=generator) for name, spec in expected_tensors(config).items()}
    state = gptq(raw, state, "int4 act-order asymmetric")
    source = home / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(raw))
    names = list(state)
    weight_map: dict[str, str] = {}
    for number in range(2):
        file = f"model-{number + 1:05}-of-00002.safetensors"
        save_file({name: state[name] for name in names[number::2]}, source / file)
        weight_map |= dict.fromkeys(names[number::2], file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    convert(source, home / "plain")
    convert(source, home / "cuda", ConvertOptions(target="cuda"))
    convert(source, home / "rounded", ConvertOptions(vision="int8", head="int4"))
    return home


@pytest.fixture
def copy_of(converted_once: Path, tmp_path: Path) -> Copy:
    """A copy of one of the folders in `converted_once`, free to be changed."""

    def copied(name: str) -> Path:
        return Path(shutil.copytree(converted_once / name, tmp_path / name))

    return copied


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer({bytes([byte]): byte for byte in range(256)}, n_queries=4)


@pytest.fixture(scope="module")
def encoder(tokenizer: Tokenizer) -> PromptEncoder:
    return PromptEncoder(tokenizer, 28)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    """A pool of its own, which `load_image` uses."""
    own = Pool()
    monkeypatch.setattr(images, "shared_pool", lambda: own)
    yield own
    own.close()
