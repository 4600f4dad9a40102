"""What every test may lean on: the oracle's folder where it is there, one torch thread, no network."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# The models under test are tiny: a second thread costs more in waiting than it computes, and one thread keeps the
# order of every sum the same from run to run. Set before torch is imported, so that subprocesses inherit it too.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
# Triton looks at this when a kernel is defined, so it is one choice for the whole process, made before any test
# imports triton. What compiles kernels does so in a subprocess without it.
os.environ.setdefault("TRITON_INTERPRET", "1")

pytest_plugins = ["tests.checkpoints"]
ROOT = Path(__file__).resolve().parent.parent
GOLDEN_LOCAL = ROOT / "tests" / "golden"
# A test that starts Python again must find this checkout, whatever is installed.
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
# A shell that runs the tests in its background leaves Ctrl-C ignored in what they start, and some of it is stopped so.
signal.signal(signal.SIGINT, signal.default_int_handler)
LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with what the original code answers: beside the checkout, or where QVL_SHARED points."""
    folder = Path(os.environ.get("QVL_SHARED", ROOT.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"no oracle data at {folder}: set QVL_SHARED to the folder that holds golden/")
    return folder


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """The golden files themselves."""
    return shared / "golden"


@pytest.fixture(scope="session")
def golden_local() -> Path:
    """The part of the golden numbers that is small enough to be kept with the tests, so that they always run."""
    return GOLDEN_LOCAL


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuses every connection that leaves the machine, so that no test passes or fails by the weather outside."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else ""
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(host).startswith(LOOPBACK):
            raise OSError(f"tests reach no network: connection to {address!r} refused")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    yield
