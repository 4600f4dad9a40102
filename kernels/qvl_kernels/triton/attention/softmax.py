"""One step of attention over a tile of keys, with the softmax carried along (Dao et al. 2022, algorithm 1)."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = 1.4426950408889634  # softmax in base 2: exp2 is one instruction


@triton.jit
def attend(q, k, v, top, mass, total, scale, visible, MASKED: tl.constexpr):
    """(top, mass, total) after the keys of a tile; scale is log2(e) / sqrt(d).

    q [M, d], k and v [N, d] of one dtype; visible bool [M, N], looked at if MASKED. top [M] is the largest score so
    far in base 2, mass [M] the sum of 2^(score - top), total [M, d] that of 2^(score - top) * v, all float32. The
    first key of a row must be visible: then top is finite from the first tile on.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    top, mass, weights, fade = softmax_step(scores, top, mass, visible, MASKED)
    return top, mass, tl.dot(weights.to(v.dtype), v, total * fade[:, None], input_precision="ieee")


@triton.jit
def softmax_step(scores, top, mass, visible, MASKED: tl.constexpr):
    """(top, mass, weights, fade) after scores [M, N] in base 2: weights [M, N] are 2^(score - top), and what was summed
    before is to be multiplied by fade [M]. The rest as in `attend`.
    """
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    fade = tl.exp2(top - higher)
    return higher, mass * fade + tl.sum(weights, 1), weights, fade
