"""Both READMEs do what they say: their Python runs, their `qvl` lines run, other commands and options exist.

Blocks marked ```python are executed in order in one namespace, in a folder of their own where every image that they
name is the demo's. A block that names a hub id is only compiled; of a `qvl` line that names a model the options are
looked up.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from qvl_runtime.cli.app import app

pytestmark = pytest.mark.cpu
ROOT = Path(__file__).resolve().parents[2]
READMES = ("README.md", "README_zh.md")
HUB_ID = re.compile(r"""["']Qwen/[\w.-]+["']""")
YOURS = re.compile(r"Qwen/[\w.-]+|\./my-")  # what only the reader has
IMAGE = re.compile(r"""[\w./-]+\.(?:png|jpe?g)(?=["'\s<]|$)""")
QVL = "from qvl_runtime.cli.app import main; main()"
KNOWN_ELSEWHERE = {"git", "pip", "cd", "source", "python3", "apt", "sudo", "echo", "printf"}


class Block(NamedTuple):
    language: str
    line: int  # of its first line in the README
    text: str


def blocks(readme: str, *languages: str) -> list[Block]:
    text = (ROOT / readme).read_text(encoding="utf-8")
    fences = re.finditer(r"^```([\w-]+)[^\n]*\n(.*?)^```\s*$", text, re.DOTALL | re.MULTILINE)
    found = [Block(f[1], text[: f.start()].count("\n") + 2, f[2]) for f in fences]
    return [block for block in found if block.language in languages]


def commands(readme: str) -> list[tuple[int, list[str]]]:
    """Each command of the shell blocks with its line number, as words; a pipe's commands one by one."""
    found = []
    for block in blocks(readme, "sh", "bash", "shell", "console"):
        joined = block.text.replace("\\\n", "  ")
        for offset, line in enumerate(joined.splitlines()):
            words = shlex.split(line.removeprefix("$ "), comments=True)
            for part in split(words, {"|", "&&", ";"}):
                found.append((block.line + offset, [word for word in part if not re.fullmatch(r"[A-Z_]+=\S*", word)]))
    return [(line, words) for line, words in found if words]


def split(words: list[str], separators: set[str]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word in separators:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


@pytest.fixture(params=READMES)
def readme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(readme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the README's images are: each name that it uses stands for the demo's image."""
    demo = ROOT / "qvl_runtime" / "assets" / "demo.jpg"
    for name in set(IMAGE.findall((ROOT / readme).read_text(encoding="utf-8"))):
        path = tmp_path / name
        if tmp_path in path.resolve().parents:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(demo, path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_is_something_to_check(readme: str) -> None:
    assert blocks(readme, "python"), f"{readme} shows no Python"
    programs = {words[0] for _, words in commands(readme)}
    assert {"make", "qvl"} <= programs, f"{readme} shows neither make nor qvl"


def test_python_blocks_run(readme: str, folder: Path) -> None:
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in blocks(readme, "python"):
        code = compile("\n" * (block.line - 1) + block.text, readme, "exec")
        if not HUB_ID.search(block.text):
            exec(code, namespace)


def test_shell_commands_exist_with_their_options(readme: str) -> None:
    targets = set(re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text()))
    for line, words in commands(readme):
        where = f"{readme} line {line}: {shlex.join(words)}"
        program, *arguments = words
        if program == "make":
            assert {word for word in arguments if word[0] != "-"} <= targets, where
        elif program == "qvl":
            subcommand = [word for word in arguments[: 2 if arguments[0] == "profile" else 1] if word[0] != "-"]
            assert_options(arguments, help_of("-c", QVL, *subcommand), where)
        elif program.endswith("python") and arguments[:1] == ["-m"] and arguments[1].startswith("tools."):
            assert_options(arguments[2:], help_of("-m", arguments[1]), where)
        else:
            assert program in KNOWN_ELSEWHERE or program.startswith(".venv/bin/") or (ROOT / program).is_file(), where


def test_the_readmes_say_the_same() -> None:
    """As many sections, table rows and code lines, and the same figures: what changes in one changes in the other."""
    texts = [(ROOT / readme).read_text(encoding="utf-8") for readme in READMES]
    for pattern in (r"(?m)^#+ ", r"(?m)^\|", r"(?m)^- ", r"!\[", r"```"):
        one, other = (len(re.findall(pattern, text)) for text in texts)
        assert one == other, f"{pattern}: {one} in {READMES[0]}, {other} in {READMES[1]}"
    tables = [re.findall(r"(?m)^\|.*\d.*$", text) for text in texts]
    for rows in zip(*tables, strict=True):
        figures = [sorted(re.findall(r"(?<![A-Za-z\d])\d+(?:,\d{3})*(?:\.\d+)?", row)) for row in rows]
        assert figures[0] == figures[1], f"other figures: {rows[0]} and {rows[1]}"


def assert_options(arguments: list[str], help_text: str, where: str) -> None:
    for option in (word.partition("=")[0] for word in arguments if re.match(r"--?[a-z]", word)):
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", help_text), f"{where}: no option {option}"


@cache
def help_of(*program: str) -> str:
    if program[0] == "-c":  # of `qvl`, in this process: a process for each subcommand takes half a minute
        shown = CliRunner().invoke(app, [*program[2:], "--help"], env={"NO_COLOR": "1", "COLUMNS": "120"})
        assert shown.exit_code == 0, f"{program}: {shown.output}"
        return shown.output
    asked = subprocess.run(
        [sys.executable, *program, "--help"], capture_output=True, text=True, cwd=ROOT, env=plain_terminal(), timeout=60
    )
    assert asked.returncode == 0, f"{program}: {asked.stderr}"
    return asked.stdout


def test_qvl_lines_run(readme: str, folder: Path) -> None:
    """What runs without a hub or files of the reader's is run, with nano; a chat gets a line to say and its end."""
    done = [words for _, words in commands(READMES[0])] if readme != READMES[0] else []
    for line, words in commands(readme):
        if words in done:
            continue
        if words[0] != "qvl" or {"--model", "-m", "--synthetic"} & set(words) or YOURS.search(shlex.join(words)):
            continue
        ran = subprocess.run(
            [sys.executable, "-c", QVL, *words[1:]],
            capture_output=True,
            text=True,
            cwd=folder,
            env=plain_terminal(),
            timeout=120,
            input="Describe it.\n",
        )
        assert ran.returncode == 0, f"{readme} line {line}: {shlex.join(words)}\n{ran.stderr}"
        assert ran.stdout.strip(), f"{readme} line {line}: {shlex.join(words)} printed nothing"


def plain_terminal() -> dict[str, str]:
    """The environment for a `qvl` whose output is read by a test."""
    return os.environ | {"NO_COLOR": "1", "COLUMNS": "120"}
