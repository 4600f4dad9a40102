"""The last kernel of sampling: select the token among the candidates by bisection over their scores."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(0x7F800000)  # the bits of the largest key
STEPS = tl.constexpr(31)  # halvings of the keys from -1 to INFINITY


@triton.jit
def _keys(scaled_ptr, start, found, BLOCK: tl.constexpr):
    """Keys of a block of candidates (the bits of -score, smaller for likelier; -1 past the last) and their weights."""
    at = start + tl.arange(0, BLOCK)
    x = tl.load(scaled_ptr + at, at < found, 0.0)
    keys = tl.where(at < found, tl.abs(x).to(tl.int32, bitcast=True), -1)
    return keys, tl.exp2(x * LOG2E).to(tl.float64)


@triton.jit
def _count_up_to(scaled_ptr, found, limit, least, BLOCK: tl.constexpr):
    """Count and mass (float64) of candidates with a key of at most `limit` and a weight of at least `least`."""
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float64)
    for start in range(0, found, BLOCK):
        keys, weights = _keys(scaled_ptr, start, found, BLOCK)
        kept = (keys >= 0) & (keys <= limit) & (weights >= least)
        count += kept.to(tl.int32)
        mass += tl.where(kept, weights, 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _key_reaching(scaled_ptr, found, min_count, target, least, BLOCK: tl.constexpr):
    """The smallest key up to which there are `min_count` candidates and more than `target` mass.

    `_count_up_to` is inlined by hand: Triton's interpreter takes milliseconds to enter a function.
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
        enough = tl.where(tl.sum(count, 0) >= min_count, tl.sum(mass, 0), -2.0) > target
        below, reached = tl.where(enough, below, middle), tl.where(enough, middle, reached)
    return reached


@triton.jit
def _weight(key):
    """exp(score) of a key."""
    return tl.exp2(-key.to(tl.float32, bitcast=True) * LOG2E).to(tl.float64)


@triton.jit
def _divide_float32(a, b):
    """a / b in float32: it counts equal scores, and a float64 division is a subroutine that spills registers."""
    return a.to(tl.float32) / b.to(tl.float32)


@triton.jit
def _token_of_rank(scaled_ptr, tokens_ptr, found, key, rank, BLOCK: tl.constexpr):
    """The token of candidate number `rank`, from 0 in the order of ids, among those with this key."""
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
def _draw(scaled_ptr, tokens_ptr, found, whole, top_k, top_p, min_p, uniform, BLOCK: tl.constexpr):
    """The token that `uniform` in [0, 1) picks from the candidates left by the cuts; `whole` is the mass of all tokens.

    The cuts keep whole keys and, of the last key, the first few in the order of ids. top-k keeps k candidates; top-p
    those preceded by less than p of the remaining mass; min-p drops weights below it, the largest being 1.
    """
    cut, kept_at_cut = tl.full([], INFINITY, tl.int32), tl.full([], 1 << 30, tl.int32)
    zero = tl.full([], 0.0, tl.float64)
    _, candidates = _count_up_to(scaled_ptr, found, INFINITY, zero, BLOCK)
    mass = whole.to(tl.float64)
    if top_k <= found:  # otherwise it is off: the candidates hold k tokens
        cut = _key_reaching(scaled_ptr, found, top_k, zero - 1, zero, BLOCK)
        count, mass = _count_up_to(scaled_ptr, found, cut - 1, zero, BLOCK)
        kept_at_cut = top_k - count
        mass += kept_at_cut.to(tl.float64) * _weight(cut)
    target = top_p.to(tl.float64) * mass * (1 - 1e-15)  # a token that reaches it to the last digit is the last one
    if tl.where(top_p < 1, candidates, -1.0) > target:
        reached = _key_reaching(scaled_ptr, found, 0, target, zero, BLOCK)
        if reached <= cut:
            _, before = _count_up_to(scaled_ptr, found, reached - 1, zero, BLOCK)
            share = tl.ceil(_divide_float32(target - before, _weight(reached))).to(tl.int32)
            kept_at_cut = tl.maximum(1, tl.minimum(share, tl.where(reached == cut, kept_at_cut, share)))
            cut = reached
    least = min_p.to(tl.float64)
    same, _ = _count_up_to(scaled_ptr, found, cut, least, BLOCK)
    count, before = _count_up_to(scaled_ptr, found, cut - 1, least, BLOCK)
    kept_at_cut = tl.minimum(kept_at_cut, same - count)
    target = uniform * (before + kept_at_cut.to(tl.float64) * _weight(cut))
    key = tl.minimum(_key_reaching(scaled_ptr, found, 0, target, least, BLOCK), cut)
    count, before = _count_up_to(scaled_ptr, found, key - 1, least, BLOCK)
    same, _ = _count_up_to(scaled_ptr, found, key, least, BLOCK)
    rank = _divide_float32(target - before, _weight(key)).to(tl.int32)
    last = tl.where(key == cut, kept_at_cut, same - count) - 1
    return _token_of_rank(scaled_ptr, tokens_ptr, found, key, tl.maximum(0, tl.minimum(rank, last)), BLOCK)


@triton.jit
def pick_kernel(
    logits_ptr, scaled_ptr, tokens_ptr, found_ptr, whole_ptr, best_ptr, ids_ptr, tops_ptr, masses_ptr,
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, uniform_ptr, slots_ptr, seen_ptr,
    chosen_ptr, logprobs_ptr,
    vocab, chunks,
    BLOCK_CHUNKS: tl.constexpr, BLOCK: tl.constexpr, DRAWS: tl.constexpr, PENALTY: tl.constexpr,
):  # fmt: skip
    """The token of a row, int64 [m], and its log probability under the logits, float32 [m]; it becomes seen.

    Without a temperature it is the first of the likeliest; DRAWS False: no row has one. A row without a distribution
    has the log probability NaN. Candidates, of each chunk best, ids, tops and masses: as the kernels of `sampling` left
    them. The power of two BLOCK_CHUNKS holds the chunks.
    """
    row = tl.program_id(0).to(tl.int64)
    chunk_index = tl.arange(0, BLOCK_CHUNKS)
    best = tl.load(best_ptr + row * chunks + chunk_index, chunk_index < chunks, float("-inf"))
    ids = tl.load(ids_ptr + row * chunks + chunk_index, chunk_index < chunks, vocab)
    highest = tl.max(best, 0)
    token = tl.where(highest > float("-inf"), tl.min(tl.where(best == highest, ids, vocab), 0), vocab)
    if DRAWS:  # noqa: SIM102 - decided when the kernel is compiled
        # where all scores are -inf, no candidate was gathered, whatever `found` says
        if tl.where(highest > float("-inf"), tl.load(temperature_ptr + row), 0.0) > 0:
            found, top_k = tl.load(found_ptr + row), tl.load(top_k_ptr + row)
            top_k = tl.where(top_k > 0, top_k, vocab + 1)
            top_p, min_p = tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
            at = row * vocab
            token = _draw(
                scaled_ptr + at,
                tokens_ptr + at,
                found,
                tl.load(whole_ptr + row),
                top_k,
                top_p,
                min_p,
                tl.load(uniform_ptr + row),
                BLOCK,
            )
    chosen = (token >= 0) & (token < vocab)  # otherwise every score is -inf
    token = tl.where(chosen, token, 0)
    tops = tl.load(tops_ptr + row * chunks + chunk_index, chunk_index < chunks, float("-inf"))
    masses = tl.load(masses_ptr + row * chunks + chunk_index, chunk_index < chunks, 0.0)
    top = tl.max(tops, 0)
    normalizer = top + LN2 * tl.log2(tl.sum(masses * tl.exp2((tops - top) * LOG2E), 0))
    logprob = tl.load(logits_ptr + row * vocab + token).to(tl.float32) - normalizer
    tl.store(chosen_ptr + row, token.to(tl.int64))
    tl.store(logprobs_ptr + row, tl.where(chosen, logprob, float("nan")))
    if PENALTY:
        slot = tl.load(slots_ptr + row)
        tl.store(seen_ptr + slot * vocab + token, 1, slot >= 0)
