"""Find a model: a folder, or a hub id in the local cache, which is downloaded only on request."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

from qvl_runtime.config.checks import require_choice
from qvl_runtime.errors import CheckpointError, DownloadError, quoted

Source = Literal["huggingface", "modelscope"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SMALL_FILES = ("*.json", "*.tiktoken")  # no Python files, images or fonts: they are not used
_WEIGHTS = ("*.safetensors", "*.bin")  # in order of preference; never both


def resolve_model(
    name: str | Path,
    *,
    download: bool = False,
    source: Source = "huggingface",
    revision: str | None = None,
    progress: bool = True,
) -> Path:
    """Return the folder of a model given as a folder or as a hub id such as "Qwen/Qwen-VL-Chat-Int4".

    A hub id is looked up in the client's local cache. The network is used only with `download`, and then only for the
    files that the runtime reads: JSON, vocabulary, and the weights in one format. Raises `CheckpointError` for a name
    that is neither, `DownloadError` where the model is not in the cache or cannot be downloaded.
    """
    require_choice("source", source, get_args(Source))
    if not isinstance(name, (str, Path)):
        raise CheckpointError(
            f"the model is {quoted(name)}; expected a folder, or a hub id such as 'Qwen/Qwen-VL-Chat'"
        )
    folder = Path(name).expanduser()
    if name and folder.is_dir():  # the empty path would be the current folder
        return folder
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; expected the folder that holds config.json and the weights")
    if isinstance(name, Path) or not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"{str(name)!r} is neither a folder nor a hub id such as 'Qwen/Qwen-VL-Chat'")
    fetch = _huggingface(progress and download) if source == "huggingface" else _modelscope()
    try:
        return _fetch_one_format(lambda patterns: fetch(name, revision, patterns, not download))
    except Exception as error:  # both clients raise the errors of several HTTP libraries
        raise _unavailable(name, source, download, error) from error


_Fetch = Callable[[str, "str | None", list[str], bool], str]


def _fetch_one_format(fetch: Callable[[list[str]], str]) -> Path:
    """Fetch the small files with each format of weights in turn, until one is found."""
    for weights in _WEIGHTS:
        folder = Path(fetch([*_SMALL_FILES, weights]))
        if any(folder.glob(weights)):
            return folder
    raise FileNotFoundError(f"it has no weights, neither {' nor '.join(_WEIGHTS)}")


def _huggingface(progress: bool) -> _Fetch:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise DownloadError("hub ids need huggingface_hub: pip install huggingface_hub, or give a folder") from error

    def fetch(name: str, revision: str | None, patterns: list[str], offline: bool) -> str:
        with _progress_bars(progress):
            return snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=offline)

    return fetch


def _modelscope() -> _Fetch:
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise DownloadError("source 'modelscope' needs its client: pip install modelscope, or give a folder") from error

    def fetch(name: str, revision: str | None, patterns: list[str], offline: bool) -> str:
        return str(snapshot_download(name, revision=revision, allow_file_pattern=patterns, local_files_only=offline))

    return fetch


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Show or hide huggingface_hub's progress bars, which have only a global switch."""
    from huggingface_hub import utils as hub

    if shown or hub.are_progress_bars_disabled():  # type: ignore[attr-defined]
        yield
        return
    hub.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        hub.enable_progress_bars()  # type: ignore[attr-defined]


def _unavailable(name: str, source: str, download: bool, error: Exception) -> DownloadError:
    if not download:
        return DownloadError(
            f"{name!r} is neither a folder nor in the local cache of {source}: pass download=True to "
            "download it, or give the folder that holds it"
        )
    lines = str(error).strip().splitlines() or ["no details"]
    return DownloadError(
        f"{name!r} cannot be downloaded from {source} ({type(error).__name__}: {lines[0]}): check the name and the "
        "connection, or copy the model to this machine and give its folder"
    )
