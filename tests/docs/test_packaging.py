"""What a stranger installs: light to import, whole, pinned, and built floor on floor."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit
ROOT = Path(__file__).resolve().parents[2]
BIN = str(Path(sys.executable).parent)


def run_python(code: str) -> str:
    """Standard output of a fresh interpreter that finds only this checkout's packages first."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_loads_nothing_heavy_and_opens_no_socket() -> None:
    heavy = ["torch", "numpy", "PIL", "tiktoken", "safetensors", "huggingface_hub", "typer", "rich", "triton"]
    code = f"""
import socket, sys
def refuse(*_): raise AssertionError("import reached for the network")
socket.socket = socket.create_connection = socket.getaddrinfo = refuse
import qvl_runtime
print([name for name in {heavy} if name in sys.modules])
"""
    assert run_python(code) == "[]\n"


def test_the_command_line_needs_no_torch_to_print_its_help() -> None:
    code = "import sys, qvl_runtime.cli.app\nprint([name for name in ('torch', 'numpy', 'PIL') if name in sys.modules])"
    assert run_python(code) == "[]\n"


def test_public_names_are_there_and_come_when_first_used() -> None:
    import qvl_runtime

    for name in ("Engine", "SamplingParams", "Completion", "Box", "load_image", "QVLError"):
        assert name in qvl_runtime.__all__ and name in dir(qvl_runtime)
        assert getattr(qvl_runtime, name).__module__.startswith("qvl_runtime.")
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        _ = qvl_runtime.Motor


def test_version_is_said_once() -> None:
    import qvl_runtime

    assert f'version = "{qvl_runtime.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_the_command_is_installed() -> None:
    from qvl_runtime.cli import main

    (script,) = entry_points(group="console_scripts", name="qvl")
    assert script.load() is main


def test_every_folder_with_code_is_a_package_and_kernels_is_none() -> None:
    for top in (ROOT / "qvl_runtime", ROOT / "kernels" / "qvl_kernels"):
        assert (top / "py.typed").is_file()
        for folder in {path.parent for path in top.rglob("*.py")}:
            assert (folder / "__init__.py").is_file(), f"{folder} would be left out of the wheel"
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow another project's package"


def test_every_requirement_is_pinned_and_every_pin_exact() -> None:
    pins = dict(re.findall(r"(?m)^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text()))
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+( ; .+)?", line) for line in lines)
    assert (pins["torch"], pins["triton"]) == ("2.13.0", "3.7.1")
    text = (ROOT / "pyproject.toml").read_text()
    tables = re.findall(r"(?ms)^(?:dependencies|cuda|plot|train|docs|wheel|dev) = \[(.*?)\]", text)
    wanted = re.findall(r'"([\w.-]+)(?:\[\w+\])?>=', "".join(tables))
    assert len(wanted) > 10
    assert {name.lower() for name in wanted} <= {name.lower() for name in pins}


def test_the_license_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_lists_its_targets_and_each_has_a_recipe() -> None:
    def make(*arguments: str) -> str:
        return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    targets = re.findall(r"(?m)^  make (\S+) ", make())
    assert {"setup", "demo", "test", "lint", "nano", "eval-nano", "clean"} <= set(targets)
    for target in targets:
        make("--dry-run", target)


@pytest.mark.skipif(shutil.which("lint-imports", path=BIN) is None, reason="import-linter is not installed: make setup")
def test_files_import_only_from_their_own_floor_and_below() -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    lint = [str(Path(BIN) / "lint-imports"), "--no-cache"]
    checked = subprocess.run(lint, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert checked.returncode == 0, checked.stdout[-3000:]
    assert " 0 broken" in checked.stdout


def test_every_folder_of_the_package_has_a_floor() -> None:
    layers = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("layers = [")[2].partition("]")[0]
    named = set(re.findall(r"qvl_runtime\.(\w+)", layers))
    folders = {path.parent.name for path in (ROOT / "qvl_runtime").glob("*/__init__.py")}
    modules = {path.stem for path in (ROOT / "qvl_runtime").glob("*.py")} - {"__init__"}
    assert folders | modules == named, "give it a floor in pyproject.toml"
