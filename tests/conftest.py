"""Shared by every test: golden files, one torch thread, no network, and a count of the skipped tests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# The models under test are tiny: a second thread waits longer than it computes, and one thread keeps the order of
# every sum the same from run to run. Set before torch is imported, so that subprocesses inherit it too.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
# Triton reads this when a kernel is defined, so it holds for the whole process and is set before any test imports
# triton. A test that compiles kernels does so in a subprocess without it.
os.environ.setdefault("TRITON_INTERPRET", "1")

pytest_plugins = ["tests.checkpoints"]
ROOT = Path(__file__).resolve().parent.parent
GOLDEN_LOCAL = ROOT / "tests" / "golden"
# A test that starts Python again must find this checkout, whatever is installed.
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
# A shell that runs the tests in the background makes their subprocesses ignore SIGINT, which some tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)
LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")


SHARED = Path(os.environ.get("QVL_SHARED", ROOT.parent / "shared"))
HAS_FULL = (SHARED / "golden" / "vision.safetensors").is_file()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the published vocabulary and the photos: next to the checkout, or where QVL_SHARED points."""
    if not HAS_FULL:
        pytest.skip(f"needs the published vocabulary and photos, which are not at {SHARED}: set QVL_SHARED")
    return SHARED


@pytest.fixture(scope="session")
def full_golden(shared: Path) -> Path:
    """All outputs of the original code, including those for photos."""
    return shared / "golden"


@pytest.fixture(scope="session")
def committed_golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The part committed with the tests, which is always available; see tests/golden/README.md."""
    folder = tmp_path_factory.mktemp("golden")
    shutil.copytree(GOLDEN_LOCAL, folder, dirs_exist_ok=True)
    complete_int4(folder)
    return folder


@pytest.fixture(scope="session", params=["committed", "full"] if HAS_FULL else ["committed"])
def golden(request: pytest.FixtureRequest) -> Path:
    """The golden files: each available set in turn."""
    folder: Path = request.getfixturevalue(f"{request.param}_golden")
    return folder


@pytest.fixture(scope="session")
def one_golden(request: pytest.FixtureRequest) -> Path:
    """One set of golden files, for slow tests: the full set if it is available."""
    folder: Path = request.getfixturevalue("full_golden" if HAS_FULL else "committed_golden")
    return folder


@pytest.fixture(scope="session")
def golden_local() -> Path:
    """The committed files as they are stored."""
    return GOLDEN_LOCAL


def complete_int4(folder: Path) -> None:
    """Write the Int4 checkpoint's shards: its packed linears, and the floats of `tiny` rounded to float16."""
    from safetensors.torch import load_file, save_file

    state: dict[str, Any] = {}
    for path in (folder / "tiny").glob("*.safetensors"):
        state |= load_file(path)
    packed = load_file(folder / "tiny-int4" / "quantized.safetensors")
    (folder / "tiny-int4" / "quantized.safetensors").unlink()
    index = json.loads((folder / "tiny-int4" / "model.safetensors.index.json").read_text())
    for file in sorted(set(index["weight_map"].values())):
        names = [name for name, place in index["weight_map"].items() if place == file]
        tensors = {name: packed[name] if name in packed else state[name].half() for name in names}
        save_file(tensors, folder / "tiny-int4" / file)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Count the skipped tests by reason: a clone has fewer files and skips more tests."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    if reasons:
        terminalreporter.section(f"{reasons.total()} skipped")
        for reason, count in reasons.most_common():
            terminalreporter.line(f"{count:4d}  {reason}")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuse every connection that leaves the machine, so that no result depends on the network."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else ""
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(host).startswith(LOOPBACK):
            raise OSError(f"tests reach no network: connection to {address!r} refused")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    yield
