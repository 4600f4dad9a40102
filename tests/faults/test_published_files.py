"""Weights and configurations in the forms that trainers, hubs and other runtimes write them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.convert.convert import convert
from qvl_runtime.convert.restore import restore
from qvl_runtime.errors import CheckpointError, ConfigError
from qvl_runtime.weights.checkpoint import Checkpoint, load_state
from qvl_runtime.weights.loader import load_weights
from tests.checkpoints import MakeState, Write
from tests.gptq_checkpoints import gptq
from tests.weights.faults import fails

CPU = torch.device("cpu")
State = dict[str, torch.Tensor]
Rename = Callable[[str], str]


def equal(found: Any, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def save_old(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def test_bin_in_the_form_of_old_torch_is_read(  # transformers#29007
    raw: dict[str, Any], make_state: MakeState, write: Write
) -> None:
    config = ModelConfig.from_dict(raw)
    state = make_state(config, torch.float16)
    folder = write(raw, {}, ".bin")
    save_old(state, folder / "pytorch_model.bin")
    equal(load_state(folder, config, torch.float16), state)
    (note,) = load_weights(folder, config, torch.float16, CPU).notes
    assert "pytorch_model.bin has the form of torch before 1.6" in note and "load and save it again" in note


def test_old_shards_parameters_and_views(raw: dict[str, Any], make_state: MakeState, write: Write) -> None:
    config = ModelConfig.from_dict(raw)
    state = make_state(config)
    folder = write(raw, state, ".bin", 2)
    for path in folder.glob("*.bin"):
        part = torch.load(path, weights_only=True)
        save_old(
            {name: torch.nn.Parameter(t) if t.ndim > 1 else torch.cat([t, t])[len(t) :] for name, t in part.items()},
            path,
        )
    equal(load_state(folder, config, torch.float32), state)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.99999])
def test_a_truncated_old_file_is_named(raw: dict[str, Any], make_state: MakeState, write: Write, share: float) -> None:
    folder = write(raw, {}, ".bin")
    path = folder / "pytorch_model.bin"
    save_old(make_state(ModelConfig.from_dict(raw)), path)
    path.write_bytes(path.read_bytes()[: max(20, int(path.stat().st_size * share))])
    fails(folder, ModelConfig.from_dict(raw), str(path), "damaged or truncated", "fetch the file again")


class Harmful:
    """Unpickled by a careless loader, it would end the test run."""

    def __reduce__(self) -> tuple[Callable[[int], object], tuple[int]]:
        return (exit, (1,))


def test_an_old_file_runs_no_code(raw: dict[str, Any], write: Write) -> None:
    folder = write(raw, {}, ".bin")
    save_old({"model": Harmful()}, folder / "pytorch_model.bin")
    fails(folder, ModelConfig.from_dict(raw), "more than tensors", "safetensors")


def test_the_first_bytes_tell_the_format(raw: dict[str, Any], make_state: MakeState, write: Write) -> None:
    config = ModelConfig.from_dict(raw)
    state = make_state(config)
    folder = write(raw, {}, ".bin")
    save_file(state, folder / "pytorch_model.bin")
    equal(load_state(folder, config, torch.float32), state)
    (folder / "pytorch_model.bin").unlink()
    for save in (torch.save, save_old):
        save(state, folder / "model.safetensors")
        equal(load_state(folder, config, torch.float32), state)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GGUF\x03\x00\x00\x00" + bytes(100), ["GGUF", "llama.cpp"]),
        (b"<!DOCTYPE html><html>Sign in", ["a web page", "download the file itself"]),
        (gzip.compress(b"abc" * 100, mtime=0), ["gzip", "gunzip"]),
        (b"\n  <html>", ["a web page"]),
        (b"\x93NUMPY\x01\x00v\x00{'descr'", ["numpy"]),
    ],
)
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_other_files_are_called_what_they_are(
    raw: dict[str, Any], write: Write, content: bytes, words: list[str], suffix: str
) -> None:
    folder = write(raw, {}, suffix)
    next(folder.glob(f"*{suffix}")).write_bytes(content)
    fails(folder, ModelConfig.from_dict(raw), *words)


@pytest.mark.parametrize("save", [torch.save, save_old])
@pytest.mark.parametrize("key", ["state_dict", "model", "module", "model_state_dict"])
def test_a_state_dict_among_other_things(
    raw: dict[str, Any], make_state: MakeState, write: Write, key: str, save: Callable[[object, Path], None]
) -> None:
    config = ModelConfig.from_dict(raw)
    state = make_state(config)
    folder = write(raw, {}, ".bin")
    save({"epoch": 3, "optimizer": {"state": {}, "param_groups": [1]}, key: state}, folder / "pytorch_model.bin")
    equal(load_state(folder, config, torch.float32), state)


def test_several_states_are_refused_by_name(raw: dict[str, Any], make_state: MakeState, write: Write) -> None:
    state = make_state(ModelConfig.from_dict(raw))
    folder = write(raw, {}, ".bin")
    torch.save({"model": state, "ema": state}, folder / "pytorch_model.bin")
    fails(folder, ModelConfig.from_dict(raw), "'model', 'ema'", "save the one")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({5: torch.ones(1)}, ["a tensor named 5"]),
        ({("a", 1): torch.ones(1)}, ["a tensor named ('a', 1)"]),
        ({"a": torch.ones(3, 3).to_sparse()}, ["'a'", "no plain tensor"]),
        ({"a": torch.ones(3, device="meta")}, ["'a'", "no plain tensor"]),
        ({"a": torch.ones(3), "b": [torch.ones(1)]}, ["'b', a list"]),
        ({"state_dict": {"a": {"b": torch.ones(1)}}}, ["'state_dict', a dict"]),
    ],
)
def test_what_is_no_state_dict_is_named(raw: dict[str, Any], write: Write, content: object, words: list[str]) -> None:
    folder = write(raw, {}, ".bin")
    torch.save(content, folder / "pytorch_model.bin")
    fails(folder, ModelConfig.from_dict(raw), *words)


RENAMES: dict[str, tuple[Rename, str]] = {
    "DataParallel": (lambda name: f"module.{name}", "'module.' is left out"),
    "PEFT": (lambda name: f"base_model.model.{name}", "'base_model.model.' is left out"),
    "torch.compile": (lambda name: f"_orig_mod.{name}", "'_orig_mod.' is left out"),
    "both": (lambda name: f"module._orig_mod.{name}", "'module.' is left out"),
    "compiled blocks": (lambda name: name.replace(".attn.", "._orig_mod.attn."), "'_orig_mod.' is left out"),
    "Lightning": (lambda name: f"model.{name}", "'model.' is left out"),
    "FSDP": (
        lambda name: f"_fsdp_wrapped_module.{name}".replace(".mlp.", "._fsdp_wrapped_module.mlp."),
        "'_fsdp_wrapped_module.' is left out",
    ),
    "checkpointed": (
        lambda name: name.replace(".ln_1.", "._checkpoint_wrapped_module.ln_1."),
        "'_checkpoint_wrapped_module.' is left out",
    ),
    "a trainer of one's own": (lambda name: f"student.net.{name}", "'student.net.' is left out"),
    "no root": (lambda name: name.removeprefix("transformer."), "'transformer.' is put in front"),
    "no root, a prefix": (lambda name: f"model.{name.removeprefix('transformer.')}", "'model.' is left out"),
}


@pytest.mark.parametrize("form", RENAMES)
@pytest.mark.parametrize("shards", [1, 2])
def test_prefixes_of_trainers_are_left_out(
    raw: dict[str, Any], make_state: MakeState, write: Write, form: str, shards: int
) -> None:
    rename, words = RENAMES[form]
    config = ModelConfig.from_dict(raw)
    state = make_state(config)
    folder = write(raw, {rename(name): tensor for name, tensor in state.items()}, shards=shards)
    equal(load_state(folder, config, torch.float32), state)
    (note,) = load_weights(folder, config, torch.float32, CPU).notes
    assert words in note


def test_published_names_are_not_remarked_on(raw: dict[str, Any], make_state: MakeState, write: Write) -> None:
    config = ModelConfig.from_dict(raw)
    assert load_weights(write(raw, make_state(config)), config, torch.float32, CPU).notes == ()


def test_names_that_only_some_share_are_refused(raw: dict[str, Any], make_state: MakeState, write: Write) -> None:
    config = ModelConfig.from_dict(raw)
    state = {f"model.{name}": tensor for name, tensor in make_state(config).items()}
    fails(write(raw, {**state, "loss.weight": torch.ones(2)}), config, "'model.' and others do not", "alone")


def test_two_copies_are_refused(raw: dict[str, Any], make_state: MakeState, write: Write) -> None:
    state = make_state(ModelConfig.from_dict(raw))
    both = {f"{who}.{name}": tensor.clone() for who in ("student", "teacher") for name, tensor in state.items()}
    with pytest.raises(CheckpointError, match=r"2 times.*'student\.transformer\.wte\.weight'.*save the one"):
        Checkpoint.open(write(raw, both))


def test_names_that_become_one_are_left_as_they_are(raw: dict[str, Any], make_state: MakeState, write: Write) -> None:
    config = ModelConfig.from_dict(raw)
    state = make_state(config)
    twice = {**state, "transformer._orig_mod.ln_f.weight": state["transformer.ln_f.weight"].clone()}
    fails(write(raw, twice), config, "transformer._orig_mod.ln_f.weight")


def test_weights_without_a_head_say_so(raw: dict[str, Any], make_state: MakeState, write: Write) -> None:
    config = ModelConfig.from_dict(raw)
    state = make_state(config)
    del state["lm_head.weight"]
    named = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    fails(write(raw, named), config, "lm_head.weight", "without its head")


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("shards", [1, 2])
def test_renamed_weights_are_converted_and_restored_under_published_names(
    raw: dict[str, Any], make_state: MakeState, write: Write, tmp_path: Path, suffix: str, shards: int
) -> None:
    state = gptq(raw, make_state(ModelConfig.from_dict(raw)), "int4")
    folder = write(raw, {f"module.{name}": tensor for name, tensor in state.items()}, suffix, shards)
    assert "'module.' is left out" in convert(folder, tmp_path / "converted").notes[0]
    restored = restore(tmp_path / "converted", tmp_path / "again")
    assert restored.exact == [] and len(restored.tensors_only) == shards
    equal(load_state(tmp_path / "again", ModelConfig.from_folder(tmp_path / "again"), torch.float16), state)
    assert Checkpoint.open(tmp_path / "again").notes == []


def test_misnamed_files_are_converted_and_restored(
    raw: dict[str, Any], make_state: MakeState, write: Write, tmp_path: Path
) -> None:
    state = gptq(raw, make_state(ModelConfig.from_dict(raw)), "int4")
    folder = write(raw, {}, ".bin")
    save_file(state, folder / "pytorch_model.bin")
    convert(folder, tmp_path / "converted")
    assert restore(tmp_path / "converted", tmp_path / "again").exact == ["pytorch_model.bin"]
    assert (tmp_path / "again/pytorch_model.bin").read_bytes() == (folder / "pytorch_model.bin").read_bytes()
    save_old(state, folder / "pytorch_model.bin")
    convert(folder, tmp_path / "converted-old")
    assert restore(tmp_path / "converted-old", tmp_path / "again-old").tensors_only == ["model.safetensors"]
    equal(load_state(tmp_path / "again-old", ModelConfig.from_folder(folder), torch.float16), state)


def test_other_suffixes_are_pointed_at(raw: dict[str, Any], write: Write) -> None:
    folder = write(raw, {})
    (folder / "model.safetensors").rename(folder / "last.ckpt")
    fails(folder, ModelConfig.from_dict(raw), "holds no weights", "'last.ckpt'", "rename it")


@pytest.mark.parametrize(
    "names",
    [
        {"architectures": ["QwenVLForConditionalGeneration"]},  # vLLM's name for this model
        {"model_type": "qwen_vl"},
        {"model_type": "qwen_vl", "architectures": ["QwenVLForConditionalGeneration"]},
        {"architectures": None},
        {"model_type": None},
    ],
)
def test_other_names_of_this_model_are_accepted(raw: dict[str, Any], names: dict[str, Any]) -> None:
    assert ModelConfig.from_dict({**raw, **names}) == ModelConfig.from_dict(raw)


@pytest.mark.parametrize(
    "names",
    [
        {"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]},
        {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]},
        {"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"]},
        {"architectures": ["QWenLMHeadModel", "Another"]},
        {"architectures": "QWenLMHeadModel2"},
    ],
)
def test_later_models_are_refused_by_name(raw: dict[str, Any], names: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="another model") as caught:
        ModelConfig.from_dict({**raw, **names})
    assert str(names.get("model_type", "qwen")) in str(caught.value)
    assert json.dumps(names)  # what a file can hold


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_that_is_stored_and_differs_is_remarked_on(
    raw: dict[str, Any], make_state: MakeState, write: Write, same: bool
) -> None:
    raw["tie_word_embeddings"] = True
    config = ModelConfig.from_dict(raw)
    state = make_state(config)
    head = state["transformer.wte.weight"] + (0 if same else 1)
    notes = load_weights(write(raw, {**state, "lm_head.weight": head}), config, torch.float32, CPU).notes
    assert len(notes) == (not same) and all("tie_word_embeddings true" in note for note in notes)
