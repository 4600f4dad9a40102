"""Finding a model: folders and the local cache without the network, downloads only when asked."""

from __future__ import annotations

import socket
import sys
import types
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
from huggingface_hub.utils import are_progress_bars_disabled  # type: ignore[attr-defined]

from qvl_runtime.errors import CheckpointError, ConfigError, DownloadError
from qvl_runtime.weights.hub import resolve_model

NAME = "Qwen/Qwen-VL-Chat"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# The files of a published repository apart from the weights.
REPOSITORY = ("config.json", "generation_config.json", "qwen.tiktoken", "modeling_qwen.py", "assets/demo.png")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network at all: even looking up a name fails the test."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"the network was touched: {args}")

    folder = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return folder


def fill_cache(cache: Path, *files: str) -> Path:
    """The layout that huggingface_hub keeps: a branch that names a commit, and a folder for the commit."""
    root = cache / f"models--{NAME.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    for file in files:
        (snapshot / file).write_text("{}")
    return snapshot


class FakeHub:
    """A client with one repository; it records what it is asked for."""

    def __init__(self, folder: Path, weights: tuple[str, ...]) -> None:
        self.folder, self.files, self.calls = folder, REPOSITORY + weights, list[dict[str, Any]]()

    def snapshot_download(self, name: str, **options: Any) -> str:
        bars = not are_progress_bars_disabled()
        self.calls.append({"name": name, "bars": bars, **options})
        patterns = options.get("allow_patterns") or options["allow_file_pattern"]
        for file in self.files:
            if any(fnmatch(file, pattern) for pattern in patterns):
                (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / file).write_text("{}")
        return str(self.folder)


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeHub]:
    def install(*weights: str) -> FakeHub:
        hub = FakeHub(tmp_path / "downloaded", weights)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
        return hub

    return install


def fetched(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path), download=True) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert resolve_model(f"~/{tmp_path.name}") == tmp_path


def test_a_folder_that_looks_like_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / NAME).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model(NAME, download=True) == Path(NAME)


@pytest.mark.parametrize("name", ["nowhere", "", "./tiny", "/no/such/folder", "a/b/c", "-x/y", Path("a/b"), "a b/c"])
def test_neither_folder_nor_hub_id(name: str | Path) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        resolve_model(name, download=True)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a file; expected the folder"):
        resolve_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize("weights", ["model-00001-of-00005.safetensors", "pytorch_model-00001-of-00010.bin"])
def test_cached_model_is_found_without_the_network(cache: Path, weights: str) -> None:
    snapshot = fill_cache(cache, "config.json", weights)
    assert resolve_model(NAME).resolve() == snapshot.resolve()


def test_uncached_model_says_how_to_download() -> None:
    with pytest.raises(DownloadError, match=r"Qwen-VL-Chat.* nor in the local cache.*download=True") as caught:
        resolve_model(NAME)
    assert "\n" not in str(caught.value)


def test_cache_without_weights_is_not_enough(cache: Path) -> None:
    fill_cache(cache, "config.json")
    with pytest.raises(DownloadError, match="download=True"):
        resolve_model(NAME)


def test_offline_download_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match=r"cannot be downloaded from huggingface.*connection") as caught:
        resolve_model(NAME, download=True)
    assert "\n" not in str(caught.value)


def test_failing_connection_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> str:
        raise TimeoutError("the server\ndid not answer")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DownloadError, match=r"TimeoutError: the server\)") as caught:
        resolve_model(NAME, download=True)
    assert "\n" not in str(caught.value)


def test_download_takes_only_what_is_read(fake_hub: Callable[..., FakeHub]) -> None:
    hub = fake_hub("model-00001-of-00001.safetensors", "pytorch_model.bin")
    folder = resolve_model(NAME, download=True, revision="v1")
    small = {"config.json", "generation_config.json", "qwen.tiktoken"}
    assert fetched(folder) == small | {"model-00001-of-00001.safetensors"}
    assert [call["revision"] for call in hub.calls] == ["v1"]
    assert [call["local_files_only"] for call in hub.calls] == [False]


def test_download_takes_bin_where_there_are_no_safetensors(fake_hub: Callable[..., FakeHub]) -> None:
    hub = fake_hub("pytorch_model-00001-of-00010.bin")
    folder = resolve_model(NAME, download=True)
    assert "pytorch_model-00001-of-00010.bin" in fetched(folder)
    assert len(hub.calls) == 2


def test_repository_without_weights(fake_hub: Callable[..., FakeHub]) -> None:
    fake_hub()
    with pytest.raises(DownloadError, match=r"no weights, neither \*\.safetensors nor \*\.bin"):
        resolve_model(NAME, download=True)


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_unless_declined(fake_hub: Callable[..., FakeHub], progress: bool) -> None:
    hub = fake_hub("model.safetensors")
    before = are_progress_bars_disabled()
    resolve_model(NAME, download=True, progress=progress)
    assert [call["bars"] for call in hub.calls] == [progress]
    assert are_progress_bars_disabled() == before


def test_modelscope_is_asked_where_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(tmp_path / "scope", ("model.safetensors",))
    module = types.ModuleType("modelscope")
    module.snapshot_download = hub.snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", module)
    folder = resolve_model("qwen/Qwen-VL-Chat", download=True, source="modelscope")
    assert fetched(folder) == {"config.json", "generation_config.json", "qwen.tiktoken", "model.safetensors"}
    assert hub.calls[0]["name"] == "qwen/Qwen-VL-Chat" and hub.calls[0]["local_files_only"] is False


@pytest.mark.parametrize(("source", "package"), [("modelscope", "modelscope"), ("huggingface", "huggingface_hub")])
def test_missing_client_says_what_to_install(monkeypatch: pytest.MonkeyPatch, source: Any, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DownloadError, match=f"pip install {package}"):
        resolve_model(NAME, download=True, source=source)


def test_unknown_source() -> None:
    with pytest.raises(ConfigError, match=r"'ftp'.*'huggingface', 'modelscope'"):
        resolve_model(NAME, source="ftp")
