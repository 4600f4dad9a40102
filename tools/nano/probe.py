"""The auxiliary loss: the thing at each cell of the image, read linearly from patches and from image tokens.

It gives the vision encoder a gradient from the first step on. Coordinates are digit classes, the form in
which the decoder generates them. The probe is dropped after training.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .scenes import Thing
from .world import COLOR_ID, KIND_ID, WORD_ID

COVER = 0.12  # the smallest share of a cell that a thing must cover to own it


class Labels(NamedTuple):
    """Per cell, [.., grid, grid]: color and kind ids (0 ground), box digits [.., 8], digit and word (-1 none)."""

    color: np.ndarray
    kind: np.ndarray
    box: np.ndarray
    digit: np.ndarray
    word: np.ndarray


def dense_labels(things: list[Thing], grid: int) -> Labels:
    """Label each cell of a grid x grid raster with the thing that covers most of it."""
    low = np.arange(grid) / grid
    high, middle = low + 1 / grid, low + 0.5 / grid
    best = np.full((grid, grid), COVER / grid**2)
    color, kind = np.zeros((2, grid, grid), np.int64)
    box = np.zeros((grid, grid, 8), np.int64)
    digit, word = np.full((2, grid, grid), -1, np.int64)
    for t in things:
        x1, y1, x2, y2 = t.box
        across = np.clip(np.minimum(high, x2) - np.maximum(low, x1), 0, None)
        down = np.clip(np.minimum(high, y2) - np.maximum(low, y1), 0, None)
        area = down[:, None] * across
        owned = area > best
        best[owned] = area[owned]
        color[owned], kind[owned] = COLOR_ID[t.color], KIND_ID[t.kind]
        box[owned] = [d for v in t.box_1000() for d in (v // 100, v // 10 % 10)]
        word[owned] = WORD_ID.get(t.text, -1)
        for value, a, b in t.glyphs:
            digit[owned & ((middle >= a) & (middle < b))[None, :]] = value
    return Labels(color, kind, box, digit, word)


class Probe(nn.Module):
    """Two linear read-outs with their cross-entropy: of patches and of image tokens."""

    def __init__(self, patch_width: int, token_width: int) -> None:
        super().__init__()
        self.sizes = [len(COLOR_ID) + 1, len(KIND_ID) + 1, 80, 10, len(WORD_ID)]
        self.patch_norm = nn.LayerNorm(patch_width, eps=1e-6)
        self.patch, self.token = nn.Linear(patch_width, sum(self.sizes)), nn.Linear(token_width, sum(self.sizes))

    def forward(self, patches: Tensor, tokens: Tensor, at_patch: Labels, at_token: Labels) -> tuple[Tensor, Tensor]:
        """Losses of patches [B, L, patch_width] and of image tokens [B, queries, token_width]."""
        return self._loss(self.patch(self.patch_norm(patches)), at_patch), self._loss(self.token(tokens), at_token)

    def _loss(self, outputs: Tensor, labels: Labels) -> Tensor:
        color, kind, box, digit, word = outputs.float().flatten(0, 1).split_with_sizes(self.sizes, -1)
        want = [torch.from_numpy(field).flatten() for field in labels]
        there = want[0] > 0
        loss = F.cross_entropy(color, want[0]) + F.cross_entropy(kind, want[1])
        if there.any():
            target = torch.from_numpy(labels.box).view(-1, 8)[there].flatten()
            error = F.cross_entropy(box[there].view(-1, 10), target, reduction="none").view(-1, 2)  # hundreds, tens
            loss = loss + 0.5 * error[:, 0].mean() + 0.25 * error[:, 1].mean()
        for logits, target in ((digit, want[3]), (word, want[4])):
            if (target >= 0).any():
                loss = loss + 0.5 * F.cross_entropy(logits, target, ignore_index=-1)
        return loss
