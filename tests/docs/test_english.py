"""Plain American English: worn phrases and British spellings fail wherever a person reads prose in this repository.

Prose is every Markdown page, every comment and string of the Python files, and the comments of the C++ sources, the
Makefile and the TOML and YAML files. Quotations are exempt: code fences, text in backticks and text in double quotes.
"""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit
ROOT = Path(__file__).resolve().parents[2]

PHRASES = (
    r"anew|reckon\w*|said aloud|goes on|in place of|as it lies|so many|beside|whoever|nobody|at the least|"
    r"who wants"
)
BRITISH = (
    r"quantis\w+|\w*colour\w*|behaviour\w*|\w*normalis\w+|optimis(?!m|t)\w+|licence\w*|grey\w*|centre\w*|"
    r"neighbour\w*|summaris\w+|recognis\w+"
)
FORBIDDEN = re.compile(rf"\b(?:{PHRASES}|{BRITISH})\b".replace(" ", r"[\s#/*]+"), re.IGNORECASE)
QUOTATION = re.compile(r"```.*?```|``.+?``|`[^`]{1,300}`|\"(?:(?!\n\s*\n)[^\"]){1,300}\"|“[^”]{1,300}”", re.DOTALL)

MARKDOWN = ("*.md", "docs/**/*.md", "examples/*.md", "benchmarks/README.md")
PYTHON = ("qvl_runtime", "kernels", "tools", "benchmarks", "tests", "examples", "docs")
# Sentences that a model reads or wrote are data: another spelling would be another prompt.
DATA = ("tools/nano", "qvl_runtime/quantize/sample_conversations.py", "tests/docs/test_english.py")

Prose = Iterator[tuple[int, str]]


def python_prose(text: str, data: bool = False) -> Prose:
    """Line and text of each run of comments and of each string, without quotation marks and f-string expressions.

    Of a file of `data`, only comments and docstrings.
    """
    lines, start = [], 0  # type: ignore[var-annotated]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            if lines and token.start[0] != start + len(lines):
                yield start, "\n".join(lines)
                lines = []
            start = start if lines else token.start[0]
            lines.append(token.string)
        elif token.type == tokenize.STRING and not (data and token.string[:3] != '"""'):
            prefix, _, body = re.fullmatch(r"(?s)(\w*)('''|\"\"\"|'|\")(.*)\2", token.string).groups()  # type: ignore[union-attr]
            yield token.start[0], re.sub(r"\{[^{}]*\}", "", body) if "f" in prefix.lower() else body
        elif token.type == getattr(tokenize, "FSTRING_MIDDLE", None) and not data:  # Python 3.12 and newer
            yield token.start[0], token.string
    yield start, "\n".join(lines)


def hash_prose(text: str) -> Prose:
    """Comments behind `#`, and the help behind a Makefile target's `##`."""
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.search(r"(?:^|\s)#+ (.*)", line):
            yield number, match[1]


def c_prose(text: str) -> Prose:
    """Runs of `//` comments, and `/* */` comments."""
    for match in re.finditer(r"//[^\n]*(?:\n\s*//[^\n]*)*|/\*.*?\*/", text, re.DOTALL):
        yield text.count("\n", 0, match.start()) + 1, match[0]


def hits(prose: Prose) -> Iterator[tuple[int, str]]:
    """Line and wording of each forbidden word, quotations blanked out."""
    for line, text in prose:
        plain = QUOTATION.sub(lambda match: re.sub(r"[^\n]", "_", match[0]), text)
        for match in FORBIDDEN.finditer(plain):
            yield line + plain.count("\n", 0, match.start()), " ".join(match[0].split())


def readings() -> Iterator[tuple[Path, Callable[[str], Prose]]]:
    """Each file that holds prose, and how to find it there."""
    for pattern in MARKDOWN:
        yield from ((path, lambda text: iter([(1, text)])) for path in ROOT.glob(pattern))
    for folder in PYTHON:
        for path in (ROOT / folder).rglob("*.py"):
            data = path.relative_to(ROOT).as_posix().startswith(DATA)
            yield path, (lambda text: python_prose(text, data=True)) if data else python_prose
    yield ROOT / "setup.py", python_prose
    yield from ((path, c_prose) for path in (ROOT / "kernels" / "csrc").rglob("*.*"))
    yield from ((ROOT / name, hash_prose) for name in ("Makefile", "pyproject.toml", "mkdocs.yml", "constraints.txt"))


def forbidden() -> list[str]:
    """`file:line: wording` of each hit in the tree."""
    found = {
        (path.relative_to(ROOT).as_posix(), line, word)
        for path, read in readings()
        for line, word in hits(read(path.read_text(encoding="utf-8")))
    }
    return [f"{path}:{line}: {word}" for path, line, word in sorted(found)]


def test_prose_is_plain_american_english() -> None:
    found = forbidden()
    assert not found, f"{len(found)} forbidden words:\n" + "\n".join(found)


def test_words_are_found_across_lines_and_quotations_are_exempt() -> None:
    source = "# It is built\n# anew; it goes\n# on.\nx = 'the colour `grey`'\ny = f'{anew} says \"so many\"'\n"
    assert list(hits(python_prose(source))) == [(4, "colour"), (2, "anew"), (2, "goes # on")]
    assert list(hits(iter([(1, "```\nanew\n```\nA grey\ncat and optimism")]))) == [(4, "grey")]
    assert list(hits(hash_prose("demo: x ## build anew\n"))) == [(1, "anew")]
    assert list(hits(c_prose("int a;  // one\n  // beside\n/* reckons */ beside();"))) == [
        (2, "beside"),
        (3, "reckons"),
    ]
