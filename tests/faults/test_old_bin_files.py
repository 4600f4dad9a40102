"""Weights in the form of torch before 1.6 lie in memory, which no command may give back as it does a file's pages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.convert.convert import convert
from qvl_runtime.convert.recipes import ConvertOptions
from qvl_runtime.convert.restore import restore
from qvl_runtime.weights.checkpoint import load_state
from tests.checkpoints import MakeState, Write
from tests.gptq_checkpoints import gptq
from tests.quantize.quantized import run
from tests.weights.faults import fails


def test_quantizing_reads_weights_twice(source: Path, whole: Path, tmp_path: Path) -> None:  # transformers#29007
    """Once for the range of a tensor, once to store it: as large as a page or more, they would be zero by then."""
    old = tmp_path / "old"
    shutil.copytree(source, old)
    state = load_file(old / "model.safetensors")
    (old / "model.safetensors").unlink()
    prefixed = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({"model": prefixed}, old / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    run(old, tmp_path / "quantized")
    expected, found = load_file(whole / "model.safetensors"), load_file(tmp_path / "quantized" / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("head", ["keep", "int8"])
def test_converting_reads_a_tied_embedding_twice(
    raw: dict[str, Any], make_state: MakeState, write: Write, tmp_path: Path, head: str
) -> None:
    """The rows of the embedding become the head, too."""
    raw["tie_word_embeddings"] = True
    state = make_state(ModelConfig.from_dict(raw))
    new = write(raw, state, ".bin")
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text(json.dumps(raw))
    torch.save(state, old / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    for folder in (new, old):
        convert(folder, tmp_path / f"converted-{folder.name}", ConvertOptions(head=head))
    files = [load_file(next((tmp_path / f"converted-{name}").glob("*.safetensors"))) for name in (new.name, "old")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_a_zip_with_a_damaged_end_is_named(raw: dict[str, Any], write: Write) -> None:
    """Its last record tells of several disks, which Python's zipfile raises an error of its own for."""
    folder = write(raw, {}, ".bin")
    path = folder / "pytorch_model.bin"
    content = bytearray(path.read_bytes())
    locator = content.rfind(b"PK\x06\x07")  # of the end record of a zip64, which torch writes
    assert locator > 0
    content[locator + 16] = 9
    path.write_bytes(content)
    fails(folder, ModelConfig.from_dict(raw), str(path), "damaged or truncated", "not a zip archive")


def test_converting_a_quantized_one_and_back(
    raw: dict[str, Any], make_state: MakeState, write: Write, tmp_path: Path
) -> None:
    state = gptq(raw, make_state(ModelConfig.from_dict(raw)), "int4 act-order asymmetric")
    folder = write(raw, {}, ".bin")
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert(folder, tmp_path / "converted")
    restore(tmp_path / "converted", tmp_path / "again")
    found = load_state(tmp_path / "again", ModelConfig.from_folder(folder), torch.float16)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
