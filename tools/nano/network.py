"""How nano trains the repository's trainable network: its random start, and rows of dialogues that share a prefix."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.finetune.network import Network
from qvl_runtime.finetune.vision import Resampler
from qvl_runtime.prompt.images import to_pixels

from .packing import Batch

HIDDEN = -1e4  # added to the scores of what a query does not see


class Outputs(NamedTuple):
    """What a training pass gives: the decoder's hidden states, and what the probe reads."""

    hidden: Tensor  # [R, T, D]
    patches: Tensor  # [P, patches, width]
    features: Tensor  # [P, queries, D]


def random_network(config: ModelConfig) -> Network:
    """A network with the weights that nano's first run starts from."""
    model = Network(config)
    for name, p in model.named_parameters():
        if p.dim() == 2 and name.endswith("weight") and "in_proj_weight" not in name:
            residual = "c_proj" in name or "out_proj" in name
            nn.init.normal_(p, std=p.shape[1] ** -0.5 * (0.3 if residual else 1.0))
        elif name.endswith("bias"):
            nn.init.zeros_(p)
    visual, pool, dim = model.visual, model.visual.attn_pool, config.visual.output_dim
    nn.init.normal_(model.wte.weight, std=0.5)
    nn.init.normal_(model.head, std=0.02)
    nn.init.normal_(visual.conv1.weight, std=(3 * config.visual.patch_size**2) ** -0.5)
    nn.init.normal_(visual.positional_embedding, std=0.1)
    nn.init.normal_(visual.proj, std=dim**-0.5)
    nn.init.normal_(pool.query, std=0.02)
    nn.init.normal_(pool.attn.in_proj_weight, std=dim**-0.5)
    nn.init.normal_(pool.attn.out_proj.weight, std=config.hidden_size**-0.5)
    with torch.no_grad():
        pool.pos_embed.copy_(sincos(math.isqrt(config.visual.n_queries), dim))
    start_local(pool)
    return model


def start_local(pool: Resampler, gain: float = 6.0) -> None:
    """Let every query of the resampler begin by looking at its own place.

    W_q and W_k of each head pick the fastest position waves of both axes (the stock order of channels would give
    whole heads a single axis), so q·k peaks where the positions agree.
    """
    d, waves = pool.query.shape[1], pool.head_dim // 4
    sines = torch.cat([torch.arange(waves), d // 4 + torch.arange(waves)])
    chosen = torch.cat([sines, d // 2 + sines])
    select = torch.zeros(pool.head_dim, d)
    select[torch.arange(pool.head_dim), chosen] = 1.0
    with torch.no_grad():
        weight = pool.attn.in_proj_weight
        weight[: 2 * d] *= 0.1
        for start in range(0, 2 * d, pool.head_dim):
            weight[start : start + pool.head_dim] += math.sqrt(gain) * select
        pool.ln_q.weight.mul_(0.3)


def sincos(side: int, dim: int) -> Tensor:
    """[side * side, dim]: the first half tells the column, the second the row, each sines then cosines."""
    waves = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * waves
    axis = torch.cat([angles.sin(), angles.cos()], 1)
    column, row = axis[None].expand(side, -1, -1), axis[:, None].expand(-1, side, -1)
    return torch.cat([column, row], -1).reshape(side * side, dim).float()


def run_batch(model: Network, batch: Batch) -> Outputs:
    """Run packed rows: segment 0 is the shared prefix, k the k-th dialogue on its own, -1 padding."""
    patches = model.visual.patches(to_pixels(batch.images))
    features = model.visual.pool(patches)
    ids, segments = torch.from_numpy(batch.ids), torch.from_numpy(batch.segments)
    h, n = model.embed(ids, features, torch.from_numpy(batch.slots)), ids.shape[1]
    seen = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    seen &= torch.ones(n, n, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape, dtype=h.dtype).masked_fill_(~seen, HIDDEN)[:, None]
    return Outputs(model.decode(h, torch.from_numpy(batch.positions), mask), patches, features)
