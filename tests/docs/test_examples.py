"""Every example runs, and prints what it promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.cpu
ROOT = Path(__file__).resolve().parents[2]
PRINTS = {
    "generate.py": ["How many objects are there?\n  3", "图里有什么?", "tokens]"],
    "stream.py": ["cat", "first token after", "tokens/s"],
    "chat_boxes.py": ["cat (", "score 0.", "3 objects", "prompt tokens came from the cache"],
    "batch.py": ["broken: error: image 1 (no-such-file.jpg) does not exist", "cat: <ref>cat</ref><box>(", "caption: "],
    "many_readers.py": ["How many objects are there?  3", "Box the cat.  <ref>cat</ref><box>("],
    "own_prompt.py": ["'<ref>'", "nats a token"],
}


def test_every_example_is_listed_and_short() -> None:
    scripts = sorted((ROOT / "examples").glob("*.py"))
    page = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in scripts} == set(PRINTS)
    for path in scripts:
        assert f"({path.name})" in page
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 40


@pytest.mark.parametrize("name", PRINTS)
def test_it_runs(name: str, tmp_path: Path) -> None:
    script = ROOT / "examples" / name
    ran = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    for text in PRINTS[name]:
        assert text in ran.stdout, ran.stdout
    if name == "chat_boxes.py":
        with Image.open(tmp_path / "boxed.png") as drawn:
            assert drawn.size == (576, 576)
