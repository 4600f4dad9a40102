"""A tokenizer small enough to check by eye, and the published ones where the oracle's folder is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qvl_runtime.prompt.chatml import PromptEncoder
from qvl_runtime.prompt.tokenizer import Tokenizer

from .chat import SIZE

MERGES = ["th", "the", " t", "in", "Pi", "ic", "你".encode()[:2], "你".encode()]


def toy_ranks() -> dict[bytes, int]:
    """Each byte is its own id; a few merges follow."""
    merges = [merge.encode() if isinstance(merge, str) else merge for merge in MERGES]
    return {token: rank for rank, token in enumerate([bytes([byte]) for byte in range(256)] + merges)}  # type: ignore[misc]


class Oracle(NamedTuple):
    """One published vocabulary with what the original answers for it."""

    tokenizer: Tokenizer
    tokens: dict[str, Any]
    chat: dict[str, Any]


@pytest.fixture(scope="session")
def toy() -> Tokenizer:
    return Tokenizer(toy_ranks(), n_queries=4)


@pytest.fixture(scope="session", params=["tiny", "full"])
def oracle(request: pytest.FixtureRequest, shared: Path) -> Oracle:
    folder = {"tiny": shared / "golden" / "tiny", "full": shared / "tokenizer"}[request.param]
    if not (folder / "qwen.tiktoken").is_file():
        pytest.skip(f"no vocabulary at {folder}")
    tokens, chat = (
        json.loads((shared / "golden" / f"{kind}_{request.param}.json").read_text(encoding="utf-8"))
        for kind in ("tokenizer", "chat")
    )
    return Oracle(Tokenizer.from_folder(folder), tokens, chat)


def answer(function: Any, *args: Any, **options: Any) -> Any:
    """What a function answers, in the goldens' form: plain JSON, or "error" if it raises a ValueError."""
    try:
        return json.loads(json.dumps(function(*args, **options)))
    except ValueError:
        return "error"


def expected(golden: Any) -> Any:
    """A golden answer, with every error reduced to "error": the wording is ours."""
    return "error" if isinstance(golden, dict) and "error" in golden else golden


@pytest.fixture(scope="session")
def encoder(toy: Tokenizer) -> PromptEncoder:
    return PromptEncoder(toy, SIZE, system="Hi.")
