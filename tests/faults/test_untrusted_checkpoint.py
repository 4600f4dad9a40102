"""Converted checkpoints of strangers: no name in a manifest leads out of its folder, and no manifest ends a program."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from qvl_runtime.convert.restore import restore
from qvl_runtime.convert.verify import verify
from qvl_runtime.engine.engine import Engine
from qvl_runtime.errors import CheckpointError, QVLError
from qvl_runtime.plan.options import checkpoint_options
from qvl_runtime.weights.file_names import name_fault
from qvl_runtime.weights.loader import load_weights, model_config
from qvl_runtime.weights.manifest import MANIFEST, Manifest
from tests.faults.conftest import Copy
from tests.gptq_checkpoints import same_files
from tools.fuzz.converted import change_manifest, read_manifest, write_manifest
from tools.fuzz.values import damaged

Change = Callable[[dict[str, Any]], object]
NAMES = ["", ".", "..", "../x.json", "../../x.json", "/x.json", "a/x.json", "a\\x.json", "C:x.json", "x\0.json"]
NAMES += ["x\n.json", "\x1b[31m.json", "CON.json", "nul", " x.json", "x.json ", "x.json.", "x" * 300, "\ud800.json"]
NAMES += [".bashrc", "x.py", "x", "x.pth"]


def load(folder: Path) -> None:
    load_weights(folder, model_config(folder), torch.float32, torch.device("cpu"))


def everything(folder: Path) -> list[Callable[[], object]]:
    """Whatever reads a manifest."""
    back = folder.parent / "deep" / "back"
    readers = [lambda: load(folder), lambda: restore(folder, back), lambda: verify(folder), lambda: Engine(folder)]
    return [*readers, lambda: checkpoint_options(folder, "auto")]


def refused(folder: Path, change: Change, expected: str = "") -> None:
    """Every reader raises one line, and nothing is written outside the folder."""
    change_manifest(folder, change)
    before = sorted(folder.parent.parent.rglob("*"))
    for read in everything(folder):
        with pytest.raises(CheckpointError) as caught:
            read()
        message = str(caught.value)
        assert message.isprintable() and len(message) <= 600 and expected in message
    assert sorted(folder.parent.parent.rglob("*")) == before


def rename(section: str, new: str) -> Change:
    def change(content: dict[str, Any]) -> None:
        entries = content[section]
        entries[new] = entries.pop(next(iter(entries)))

    return change


def as_restored(new: str) -> Change:
    return lambda content: content["sources"][next(iter(content["sources"]))].update(restored_as=new)


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_no_plain_names_of_files(copy_of: Copy, name: str) -> None:
    folder = copy_of("plain")
    content = read_manifest(folder)
    for change in (*(rename(s, name) for s in ("sources", "indexes", "companions", "shards")), as_restored(name)):
        write_manifest(folder, content)
        change_manifest(folder, change)
        with pytest.raises(CheckpointError, match=MANIFEST):
            Manifest.read(folder)


@pytest.mark.parametrize(
    "change, expected",
    [
        (rename("indexes", "../../../.profile"), "names a folder"),
        (rename("indexes", "config.json"), "of another kind"),
        (rename("indexes", "model.safetensors"), "of another kind"),
        (rename("companions", "/etc/passwd"), "names a folder"),
        (rename("companions", "x.index.json"), "among its companions"),
        (rename("companions", MANIFEST), "two files named"),
        (as_restored("/tmp/x.safetensors"), "names a folder"),
        (as_restored("config.json"), "of another kind"),
        (as_restored("MODEL-00002-of-00002.safetensors"), "two files named"),
        (rename("shards", "../plain/qvl-00001.safetensors"), "names a folder"),
        (lambda content: content.update(target="../cpu"), "target is"),
        (lambda content: content.update(head="int1048576"), "head is"),
        (lambda content: content["sources"].popitem()[1] and content.update(sources=[]), "expected an object"),
        (lambda content: content.update(notes=["a"] * 3 + [1]), "expected a text"),
        (lambda content: content.update(surprise=1), "surprise"),
        (lambda content: content.update(format=2), "format 2"),
        (lambda content: content.update(state=content["state"] * 2), "twice"),
        (lambda content: content["shards"]["qvl-00001.safetensors"].update(front="f"), "for a SHA-256"),
    ],
)
def test_manifests_that_no_conversion_writes(copy_of: Copy, change: Change, expected: str) -> None:
    refused(copy_of("plain"), change, expected)


@pytest.mark.parametrize("name", [".profile", "x" * 256, "é" * 128, "COM1.safetensors", "aux", "a:b", "\u202e.json "])
def test_what_is_no_plain_name(name: str) -> None:
    assert name_fault(name) or name == ".profile"
    assert not name_fault("model-00001-of-00002.safetensors") and not name_fault("é" * 120 + ".json")


def test_index_whose_files_lie_elsewhere(copy_of: Copy) -> None:
    folder = copy_of("plain")

    def change(content: dict[str, Any]) -> None:
        index = {"weight_map": {"transformer.wte.weight": "../../../home/model.safetensors"}}
        content["indexes"]["model.safetensors.index.json"] = json.dumps(index)

    change_manifest(folder, change)
    with pytest.raises(CheckpointError, match="names a folder"):
        restore(folder, folder.parent / "back")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["plain"]


def test_a_text_that_is_no_index_is_restored_as_it_is(copy_of: Copy) -> None:
    folder = copy_of("plain")
    change_manifest(folder, lambda content: content["indexes"].update({"old.bin.index.json": "{"}))
    restore(folder, folder.parent / "back")
    assert (folder.parent / "back" / "old.bin.index.json").read_text() == "{"


def test_links_that_lead_out_of_the_folder(copy_of: Copy, tmp_path: Path) -> None:
    folder = copy_of("plain")
    (tmp_path / "secret").write_text((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        restore(folder, tmp_path / "back")
    assert "leads out of its folder" in verify(folder).faults[0]
    assert not (tmp_path / "back").exists()


def test_links_of_a_hub_cache_are_followed(copy_of: Copy, converted_once: Path, tmp_path: Path) -> None:
    folder = copy_of("plain")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs = tmp_path / "models--a--b" / "blobs"
    for made in (snapshot, blobs):
        made.mkdir(parents=True)
    for number, path in enumerate(folder.iterdir()):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    assert verify(snapshot).faults == []
    load(snapshot)
    restore(snapshot, tmp_path / "back")
    same_files(converted_once / "source", tmp_path / "back")


def test_a_companion_that_was_changed_is_not_passed_on(copy_of: Copy) -> None:
    folder = copy_of("plain")
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    with pytest.raises(CheckpointError, match="was changed after the conversion"):
        restore(folder, folder.parent / "back")


def test_headers_of_sources(copy_of: Copy) -> None:
    """The header decides where bytes are written and how many."""
    folder = copy_of("plain")
    content = read_manifest(folder)
    name, source = next(iter(content["sources"].items()))
    header = json.loads(source["header"])
    first = next(key for key in header if key != "__metadata__")
    entry = header[first]
    begin, end = entry["data_offsets"]
    others: list[Any] = [None, 1, [], {}, {**entry, "dtype": "F7"}]
    strange: list[Any] = [{**header, first: other} for other in others]
    strange += [{**header, first: {**entry, "data_offsets": at}} for at in ([0], [-1, 2], [begin, end + 1], "ab", None)]
    strange += [{**header, first: {**entry, "shape": at}} for at in ([-1], [2**62] * 9, [1] * 10**5, [True], [1.0])]
    strange += [{**header, first: {**entry, "data_offsets": [0, 2**62], "shape": [2**61], "dtype": "F16"}}, [], 3]
    strange += [{key: value for key, value in header.items() if key != first}, {**header, "more": entry}]
    for changed in strange:
        content["sources"][name] = {**source, "header": json.dumps(changed)}
        write_manifest(folder, content)
        with pytest.raises(CheckpointError):
            restore(folder, folder.parent / "back")
    content["sources"][name] = source | {"header": "[" * 100_000}
    write_manifest(folder, content)
    with pytest.raises(CheckpointError, match="levels deep"):
        restore(folder, folder.parent / "back")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["plain"]


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("kind", ["plain", "rounded"])
def test_mutated_manifests(copy_of: Copy, kind: str, seed: int) -> None:
    """A typed error, or the right result: never another exception."""
    folder, random = copy_of(kind), Random(seed)
    change: Any = damaged(random, read_manifest(folder))
    write_manifest(folder, change if isinstance(change, dict) else {})
    for read in (lambda: load(folder), lambda: restore(folder, folder.parent / "back"), lambda: verify(folder)):
        try:
            read()
        except QVLError as error:
            assert str(error).isprintable() and len(str(error)) <= 600
    made = {path.name for path in folder.parent.iterdir()}
    assert made <= {kind, "back"}


def test_checksums_are_called_no_signature(copy_of: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    from qvl_runtime.cli.app import app

    with pytest.raises(SystemExit) as ended:
        app(["verify", str(copy_of("plain"))])
    assert ended.value.code in (0, None)
    said = capsys.readouterr()
    assert "not a signature" in said.out + said.err
