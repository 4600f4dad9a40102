"""Nano's own vocabulary: byte-pair merges learned from the dialogues, written in Qwen's file format."""

from __future__ import annotations

import base64
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np

from qvl_runtime.prompt.tokenizer import WORD_PATTERN

from .dialogue import GREETINGS, about_two, turns
from .scenes import SceneConfig, draw_scene

RANKS = 896  # 256 bytes and 640 merges; with Qwen's 217 special tokens 1113 ids, in a table of 1152 rows


def corpus(scenes: int = 1500) -> str:
    """Questions and answers about drawn scenes, one a line, in both languages."""
    rng, config = np.random.default_rng(7), SceneConfig()
    lines = ["system", "user", "assistant", "You are a helpful assistant.", "Picture 1:", "Answer:"] * 50
    lines += [text for pair in GREETINGS for text in pair] * 20
    for _ in range(scenes):
        pair = [draw_scene(rng, config)[1] for _ in range(2)]
        for chinese in (False, True):
            dialogue_turns = [*turns(rng, pair[0], chinese), *about_two(rng, pair, chinese)]
            lines += [text for turn in dialogue_turns for text in (turn.question, turn.answer)]
    return "\n".join(lines)


def learn_ranks(text: str, size: int = RANKS) -> dict[bytes, int]:
    """Byte-pair encoding (Sennrich et al. 2016, 3.2): merge the most frequent pair until there are `size` ranks."""
    import regex

    words = Counter(tuple(bytes([b]) for b in piece.encode()) for piece in regex.findall(WORD_PATTERN, text))
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < size:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        # the first in byte order among equals, so that the file is the same on every run
        best = min(pairs, key=lambda p: (-pairs[p], p))
        ranks[best[0] + best[1]] = len(ranks)
        words = Counter({_merged(word, best): count for word, count in words.items()})
    return ranks


def _merged(word: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    out: list[bytes] = []
    for part in word:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return tuple(out)


def write_ranks(ranks: dict[bytes, int], path: Path) -> None:
    """One line a token: base64 of its bytes, a space, its rank."""
    lines = (base64.b64encode(token) + b" " + str(rank).encode() for token, rank in ranks.items())
    path.write_bytes(b"\n".join(lines) + b"\n")
