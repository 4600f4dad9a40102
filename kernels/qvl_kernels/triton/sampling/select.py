"""The last kernel of sampling: from candidates to the token, by bisection over their scores."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(0x7F800000)  # the bits of the largest key
STEPS = tl.constexpr(31)  # halvings of the keys from -1 to INFINITY


@triton.jit
def _keys(scaled_ptr, start, found, BLOCK: tl.constexpr):
    """Keys of a block of candidates, the bits of -score: the likelier, the smaller; -1 beyond the last; and weights."""
    at = start + tl.arange(0, BLOCK)
    x = tl.load(scaled_ptr + at, at < found, 0.0)
    keys = tl.where(at < found, tl.abs(x).to(tl.int32, bitcast=True), -1)
    return keys, tl.exp2(x * LOG2E).to(tl.float64)


@triton.jit
def _up_to(scaled_ptr, found, limit, least, BLOCK: tl.constexpr):
    """Candidates with a key of at most `limit` and a weight of at least `least`: how many, and their mass (float64)."""
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float64)
    for start in range(0, found, BLOCK):
        keys, weights = _keys(scaled_ptr, start, found, BLOCK)
        kept = (keys >= 0) & (keys <= limit) & (weights >= least)
        count += kept.to(tl.int32)
        mass += tl.where(kept, weights, 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _reaching(scaled_ptr, found, wanted, target, least, BLOCK: tl.constexpr):
    """The smallest key up to which there are `wanted` candidates and more than `target` mass.

    The pass of `_up_to` is written out: Triton's interpreter takes milliseconds to enter a function.
    """
    below, reached = tl.full([], -1, tl.int32), tl.full([], INFINITY, tl.int32)
    for _ in range(STEPS):
        middle = below + (reached - below) // 2
        count = tl.zeros([BLOCK], tl.int32)
        mass = tl.zeros([BLOCK], tl.float64)
        for start in range(0, found, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(scaled_ptr + at, at < found, float("-inf"))
            weights = tl.exp2(x * LOG2E).to(tl.float64)
            kept = (at < found) & (tl.abs(x).to(tl.int32, bitcast=True) <= middle) & (weights >= least)
            count += kept.to(tl.int32)
            mass += tl.where(kept, weights, 0.0)
        enough = tl.where(tl.sum(count, 0) >= wanted, tl.sum(mass, 0), -2.0) > target
        below, reached = tl.where(enough, below, middle), tl.where(enough, middle, reached)
    return reached


@triton.jit
def _weight(key):
    """exp(score) of a key."""
    return tl.exp2(-key.to(tl.float32, bitcast=True) * LOG2E).to(tl.float64)


@triton.jit
def _ratio(a, b):
    """a / b in float32: it counts equals, and a float64 division is a subroutine that spills registers."""
    return a.to(tl.float32) / b.to(tl.float32)


@triton.jit
def _token(scaled_ptr, tokens_ptr, found, key, rank, BLOCK: tl.constexpr):
    """The token of the candidate that is number `rank`, from 0 and in the order of ids, among those with this key."""
    before = 0
    token = tl.full([], -1, tl.int32)
    for start in range(0, found, BLOCK):
        keys, _ = _keys(scaled_ptr, start, found, BLOCK)
        same = keys == key
        order = before + tl.cumsum(same.to(tl.int32), 0) - 1
        at = start + tl.arange(0, BLOCK)
        tokens = tl.load(tokens_ptr + at, at < found, -1)
        token = tl.maximum(token, tl.max(tl.where(same & (order == rank), tokens, -1), 0))
        before += tl.sum(same.to(tl.int32), 0)
    return token


@triton.jit
def _drawn(scaled_ptr, tokens_ptr, found, whole, top_k, top_p, min_p, dice, BLOCK: tl.constexpr):
    """The token that dice in [0, 1) picks from the candidates that the cuts leave; `whole` is the mass of all tokens.

    The cuts keep whole keys and, of the last key, the first few in the order of ids. top-k keeps k candidates; top-p
    those before which lies less than p of the mass that is left; min-p drops weights below it, the largest being 1.
    """
    cut, spare = tl.full([], INFINITY, tl.int32), tl.full([], 1 << 30, tl.int32)
    nothing = tl.full([], 0.0, tl.float64)
    _, candidates = _up_to(scaled_ptr, found, INFINITY, nothing, BLOCK)
    mass = whole.to(tl.float64)
    if top_k <= found:  # otherwise it is off: the candidates hold k tokens
        cut = _reaching(scaled_ptr, found, top_k, nothing - 1, nothing, BLOCK)
        count, mass = _up_to(scaled_ptr, found, cut - 1, nothing, BLOCK)
        spare = top_k - count
        mass += spare.to(tl.float64) * _weight(cut)
    target = top_p.to(tl.float64) * mass * (1 - 1e-15)  # a token that reaches it to the last digit is the last one
    if tl.where(top_p < 1, candidates, -1.0) > target:
        reached = _reaching(scaled_ptr, found, 0, target, nothing, BLOCK)
        if reached <= cut:
            _, before = _up_to(scaled_ptr, found, reached - 1, nothing, BLOCK)
            share = tl.ceil(_ratio(target - before, _weight(reached))).to(tl.int32)
            spare = tl.maximum(1, tl.minimum(share, tl.where(reached == cut, spare, share)))
            cut = reached
    least = min_p.to(tl.float64)
    same, _ = _up_to(scaled_ptr, found, cut, least, BLOCK)
    count, before = _up_to(scaled_ptr, found, cut - 1, least, BLOCK)
    spare = tl.minimum(spare, same - count)
    target = dice * (before + spare.to(tl.float64) * _weight(cut))
    key = tl.minimum(_reaching(scaled_ptr, found, 0, target, least, BLOCK), cut)
    count, before = _up_to(scaled_ptr, found, key - 1, least, BLOCK)
    same, _ = _up_to(scaled_ptr, found, key, least, BLOCK)
    rank = _ratio(target - before, _weight(key)).to(tl.int32)
    last = tl.where(key == cut, spare, same - count) - 1
    return _token(scaled_ptr, tokens_ptr, found, key, tl.maximum(0, tl.minimum(rank, last)), BLOCK)


@triton.jit
def pick_kernel(
    logits_ptr, scaled_ptr, tokens_ptr, found_ptr, whole_ptr, best_ptr, ids_ptr, tops_ptr, masses_ptr,
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, dice_ptr, slots_ptr, seen_ptr,
    chosen_ptr, logprobs_ptr,
    vocab, chunks,
    MOST: tl.constexpr, BLOCK: tl.constexpr, DRAWS: tl.constexpr, PENALTY: tl.constexpr,
):  # fmt: skip
    """The token of a row, int64 [m], and its log probability under the logits, float32 [m]; it becomes seen.

    Without a temperature it is the first of the likeliest; DRAWS False: no row has one. Candidates, of each chunk best,
    ids, tops and masses: as the kernels of `sampling` left them. MOST is the power of two that holds the chunks.
    """
    row = tl.program_id(0).to(tl.int64)
    every = tl.arange(0, MOST)
    best = tl.load(best_ptr + row * chunks + every, every < chunks, float("-inf"))
    ids = tl.load(ids_ptr + row * chunks + every, every < chunks, vocab)
    token = tl.min(tl.where(best == tl.max(best, 0), ids, vocab), 0)
    if DRAWS:  # noqa: SIM102 - decided when the kernel is compiled
        if tl.load(temperature_ptr + row) > 0:
            found, top_k = tl.load(found_ptr + row), tl.load(top_k_ptr + row)
            top_k = tl.where(top_k > 0, top_k, vocab + 1)
            top_p, min_p = tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
            at = row * vocab
            token = _drawn(
                scaled_ptr + at,
                tokens_ptr + at,
                found,
                tl.load(whole_ptr + row),
                top_k,
                top_p,
                min_p,
                tl.load(dice_ptr + row),
                BLOCK,
            )
    tops = tl.load(tops_ptr + row * chunks + every, every < chunks, float("-inf"))
    masses = tl.load(masses_ptr + row * chunks + every, every < chunks, 0.0)
    top = tl.max(tops, 0)
    normalizer = top + LN2 * tl.log2(tl.sum(masses * tl.exp2((tops - top) * LOG2E), 0))
    tl.store(chosen_ptr + row, token.to(tl.int64))
    tl.store(logprobs_ptr + row, tl.load(logits_ptr + row * vocab + token).to(tl.float32) - normalizer)
    if PENALTY:
        slot = tl.load(slots_ptr + row)
        tl.store(seen_ptr + slot * vocab + token, 1, slot >= 0)
