"""The wheel of `make wheel`: installed where there is no compiler, it runs the demo on the C++ kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu
ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("qvl_runtime", "kernels", "setup.py", "pyproject.toml")


@pytest.fixture(scope="module")
def wheel() -> Path:
    """The wheel in dist/, if it is newer than what it was built from."""
    found = sorted((ROOT / "dist").glob("qvl_runtime-*.whl"), key=lambda path: path.stat().st_mtime)
    if not found:
        pytest.skip("no wheel in dist/: `make wheel` builds one")
    files = [path for name in SOURCES for path in (ROOT / name, *(ROOT / name).rglob("*")) if path.is_file()]
    newest = max(path.stat().st_mtime for path in files if path.suffix not in (".so", ".pyc"))
    if newest > found[-1].stat().st_mtime:
        pytest.skip(f"{found[-1].name} is older than the sources: `make wheel` builds it again")
    return found[-1]


def test_one_wheel_serves_every_python(wheel: Path) -> None:
    tags = wheel.stem.split("-")[2:]
    assert tags[:2] == ["py3", "none"], "the library is loaded by ctypes and knows no Python ABI"
    if sys.platform == "linux":
        assert tags[2].startswith("manylinux_2_"), wheel.name


def test_it_holds_every_module_and_nothing_of_the_checkout(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "qvl_runtime").rglob("*.py")}
    modules |= {path.relative_to(ROOT / "kernels").as_posix() for path in (ROOT / "kernels/qvl_kernels").rglob("*.py")}
    data = {path.relative_to(ROOT).as_posix() for name in ("nano", "nano_int4", "assets")
            for path in (ROOT / "qvl_runtime" / name).iterdir()}  # fmt: skip
    assert modules | data | {"qvl_kernels/_cpu.so", "qvl_kernels/py.typed", "qvl_runtime/py.typed"} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"qvl_kernels", "qvl_runtime"}


def test_it_runs_the_demo_without_a_compiler(wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "env"
    bare = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "QVL_CPU_LIBRARY")}
    bare |= {"PATH": str(folder / "bin"), "CC": "/bin/false", "CXX": "/bin/false"}

    def run(*command: str | Path) -> str:
        ran = subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True, timeout=240)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    packages = next((folder / "lib").glob("python*/site-packages"))
    # torch and the other dependencies come from the environment that runs the tests
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    shown = run(folder / "bin" / "qvl", "demo", "--out", tmp_path / "demo.png")
    assert "C++ kernels" in shown and (tmp_path / "demo.png").is_file(), shown
    where = run(python, "-c", "import qvl_runtime, qvl_kernels; print(qvl_runtime.__file__, qvl_kernels.__file__)")
    assert all(path.startswith(str(packages)) for path in where.split()), where
