"""What a stranger installs: light to import, whole, pinned, and built floor on floor."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit
ROOT = Path(__file__).resolve().parents[2]

# Of the design: a file imports from its own floor and those below.
FLOORS = {
    "qvl_kernels": 0,
    "errors": 1,
    "settings": 1,
    "config": 1,
    "engine_config": 1,
    "prompt": 1,
    "model": 2,
    "weights": 2,
    "schedule": 3,
    "device": 4,
    "engine": 4,
    "async_engine": 4,
    "profile": 5,
    "weights_cli": 5,
    "weights_commands": 5,
    "plan_report": 5,
    "quantize_report": 5,
    "quantizing": 5,
    "terminal": 5,
    "options": 5,
    "commands": 5,
    "repl": 5,
    "doctor": 5,
    "demo": 5,
    "batch": 5,
    "cli": 5,
}


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
        _ = qvl_runtime.Motor  # type: ignore[attr-defined]


def test_version_is_said_once() -> None:
    import qvl_runtime

    assert f'version = "{qvl_runtime.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_the_command_is_installed() -> None:
    from qvl_runtime.cli.app import main

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
    assert (pins["torch"], pins["triton"]) == ("2.13.0", "3.9.0")
    text = (ROOT / "pyproject.toml").read_text()
    tables = re.findall(r"(?ms)^(?:dependencies|cuda|plot|train|dev) = \[(.*?)\]", text)
    wanted = re.findall(r'"([\w.-]+)>=', "".join(tables))
    assert len(wanted) > 10
    assert {name.lower() for name in wanted} <= {name.lower() for name in pins}


def test_the_licence_is_apache_2() -> None:
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


def imports(path: Path) -> Iterator[str]:
    """Names of our own modules that a file imports, wherever in it, such as "prompt.boxes" or "qvl_kernels"."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "qvl_runtime":
                names = [f"qvl_runtime.{alias.name}" for alias in node.names]
        yield from (name for name in names if name.split(".")[0] in ("qvl_runtime", "qvl_kernels"))


def floor(module: str) -> int:
    top, _, rest = module.partition(".")
    name = top if top == "qvl_kernels" else rest.partition(".")[0]
    assert name in FLOORS, f"{module} has no floor: give it one, in the design and here"
    return FLOORS[name]


def test_files_import_only_from_their_own_floor_and_below() -> None:
    for top, folder in (("qvl_runtime", ROOT), ("qvl_kernels", ROOT / "kernels")):
        for path in sorted((folder / top).rglob("*.py")):
            module = ".".join(path.relative_to(folder).with_suffix("").parts)
            if module == "qvl_runtime.__init__":
                continue  # the front door names what lies on every floor, and loads it when asked
            for imported in imports(path):
                assert floor(imported) <= floor(module), f"{module} reaches up to {imported}"
