"""Greedy answers of the training network, batched over questions of one length: quick scores while it trains."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qvl_kernels.util import cdiv
from qvl_runtime.finetune.network import Network
from qvl_runtime.prompt.images import to_pixels

from .packing import ASK, END, SYSTEM, Packer


@torch.no_grad()
def answers(
    model: Network, packer: Packer, images: np.ndarray, which: Sequence[int], questions: Sequence[str]
) -> list[str]:
    """One answer for each question about images[which]: uint8 [P, S, S, 3]; in the order asked."""
    features = torch.cat([model.visual(to_pixels(p)) for p in np.array_split(images, cdiv(len(images), 64))])
    prefix = packer.encode(SYSTEM + "Picture 1:" + packer.image)
    start = prefix.index(packer.visual.image_start_id) + 1
    rows = torch.arange(len(features))
    slots = torch.stack([rows, torch.full_like(rows, start), rows], 1)
    past: list[list[Tensor]] = [[] for _ in model.blocks]
    _step(model, model.embed(torch.tensor(prefix).expand(len(features), -1), features, slots), 0, past)

    by_length: dict[int, list[int]] = defaultdict(list)
    encoded = [packer.encode(q + ASK) for q in questions]
    for i, ids in enumerate(encoded):
        by_length[len(ids)].append(i)
    out = [""] * len(questions)
    for chosen in by_length.values():
        owner = torch.tensor([which[i] for i in chosen])
        cache = [[k[owner], v[owner]] for k, v in past]
        made = _greedy(model, torch.tensor([encoded[i] for i in chosen]), len(prefix), cache, packer.encode(END)[0])
        for i, ids in zip(chosen, made, strict=True):
            out[i] = packer.tokenizer.decode(ids)
    return out


def _greedy(
    model: Network, ids: Tensor, position: int, past: list[list[Tensor]], end: int, limit: int = 110
) -> list[list[int]]:
    made: list[Tensor] = []
    done = torch.zeros(len(ids), dtype=torch.bool)
    while not done.all() and len(made) < limit:
        h = _step(model, model.wte(ids), position, past)
        position += ids.shape[1]
        ids = model.logits(h[:, -1]).argmax(-1, keepdim=True)
        made.append(ids)
        done |= ids[:, 0] == end
    rows = torch.cat(made, 1).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


def _step(model: Network, h: Tensor, position: int, past: list[list[Tensor]]) -> Tensor:
    n = h.shape[1]
    mask = torch.zeros(n, position + n, dtype=h.dtype)
    mask[:, position:].masked_fill_(~torch.ones(n, n, dtype=torch.bool).tril(), -1e4)
    return model.decode(h, torch.arange(position, position + n).expand(len(h), -1), mask, past)
