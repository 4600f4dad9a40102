"""Sample the next token of each row on the GPU: penalty, bias, mask, temperature, top-k, top-p, min-p and draw.

The vocabulary is never sorted. Every cut and the draw itself need the place in the ranking where a count or a mass is
reached, and a bisection over the scores finds it. It runs over candidates: the tokens above the first of a few
thresholds that is known to include every token that can be kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvl_kernels.reference.sampling import SampledTokens, SamplingRows
from qvl_kernels.triton import checks
from qvl_kernels.triton.launch import Launch, Spec
from qvl_kernels.triton.sampling.select import pick_kernel
from qvl_kernels.util import cdiv

CHUNK = 2048  # tokens of a program that goes over the vocabulary
LEVELS = 32  # thresholds below the highest score: 0.25 * 1.17^j, so that the last one is 32.5
LOWEST = tl.constexpr(0.25)
GROWTH = tl.constexpr(0.2265085)  # log2(1.17)
LOG2E = tl.constexpr(1.4426950408889634)
Arguments = dict[str, Tensor | int | float | None]
COLDEST = tl.constexpr(1e-30)


@triton.jit
def score_kernel(
    logits_ptr, penalty_ptr, slots_ptr, seen_ptr, bias_ptr, allowed_ptr,
    scores_ptr, tops_ptr, masses_ptr, best_ptr, ids_ptr,
    vocab, chunks, words,
    PENALTY: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """scores = (seen ? logits / penalty or logits * penalty by its sign : logits) + bias, float32 [m, vocab].

    A token whose bit in allowed int32 [m, words] is 0 has the score -inf.

    Of each chunk, all [m, chunks]: tops and masses of the logits (largest, and sum of 2^((x - top) log2 e)), best
    and ids of the scores (largest, and the first token that has it). The mass is NaN where a logit is NaN or +inf, or a
    score +inf.
    """
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = token < vocab
    x = tl.load(logits_ptr + row * vocab + token, inside, float("-inf")).to(tl.float32)
    at = row * chunks + chunk
    top = tl.max(x, 0)
    tl.store(tops_ptr + at, top)
    reference = tl.where(top == float("-inf"), 0.0, top)  # a chunk of -inf has the mass 0, not NaN
    mass = tl.sum(tl.exp2((x - reference) * LOG2E), 0)
    if PENALTY or BIAS:
        slot = tl.load(slots_ptr + row)
        known = token < tl.where(slot >= 0, vocab, 0)
        if PENALTY:
            penalty = tl.load(penalty_ptr + row)
            seen = tl.load(seen_ptr + slot * vocab + token, known, 0) != 0
            x = tl.where(seen, tl.where(x > 0, tl.div_rn(x, penalty), x * penalty), x)
        if BIAS:
            bias = tl.load(bias_ptr + slot * vocab + token, known, 0.0)
            x = tl.where(bias == float("-inf"), bias, x + bias)
    if MASK:
        word = tl.load(allowed_ptr + row * words + token // 32, inside, 0)
        x = tl.where((word >> (token % 32)) & 1 != 0, x, float("-inf"))
    best = tl.max(x, 0)
    tl.store(masses_ptr + at, tl.where(best < float("inf"), mass, float("nan")))
    tl.store(best_ptr + at, best)
    tl.store(ids_ptr + at, tl.min(tl.where((x == best) & inside, token, vocab), 0))
    tl.store(scores_ptr + row * vocab + token, x, inside)


@triton.jit
def _scaled(scores_ptr, best_ptr, temperature_ptr, row, token, vocab, chunks, BLOCK_CHUNKS: tl.constexpr):
    """Scores of tokens below the row's highest, over the temperature: at most 0, finite at any temperature."""
    chunk_index = tl.arange(0, BLOCK_CHUNKS)
    best = tl.max(tl.load(best_ptr + row * chunks + chunk_index, chunk_index < chunks, float("-inf")), 0)
    x = tl.load(scores_ptr + row * vocab + token, token < vocab, float("-inf"))
    return (x - best) / tl.maximum(tl.load(temperature_ptr + row), COLDEST)


@triton.jit
def level_kernel(
    scores_ptr, best_ptr, temperature_ptr, counts_ptr, mass_ptr, vocab, chunks,
    CHUNK: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Count and mass (of exp(scaled score)) of a chunk's tokens above each threshold: [m, LEVELS + 1, chunks].

    The last row is for all tokens. BLOCK_CHUNKS is the power of two that holds the chunks.
    """
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if tl.load(temperature_ptr + row) > 0:
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        x = _scaled(scores_ptr, best_ptr, temperature_ptr, row, token, vocab, chunks, BLOCK_CHUNKS)
        weight = tl.exp2(x * LOG2E)
        at = row * (LEVELS + 1) * chunks + chunk
        for level in range(LEVELS):
            above = x >= tl.exp2(tl.cast(level, tl.float32) * GROWTH) * -LOWEST
            tl.store(counts_ptr + at + level * chunks, tl.sum(above.to(tl.int32), 0))
            tl.store(mass_ptr + at + level * chunks, tl.sum(tl.where(above, weight, 0.0), 0))
        tl.store(counts_ptr + at + LEVELS * chunks, tl.sum((token < vocab).to(tl.int32), 0))
        tl.store(mass_ptr + at + LEVELS * chunks, tl.sum(weight, 0))


@triton.jit
def gather_kernel(
    scores_ptr, best_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, counts_ptr, mass_ptr,
    scaled_ptr, tokens_ptr, found_ptr, whole_ptr,
    vocab, chunks,
    CHUNK: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, LEVELS: tl.constexpr, ROUND_LEVELS: tl.constexpr,
):  # fmt: skip
    """Gather candidates: scaled scores and tokens above the first threshold that includes all that may be kept.

    scaled float32 and tokens int32 [m, vocab], of which found [m] are filled; whole [m] is the mass of all tokens. A
    top-k needs k of them; else a top-p needs that mass, or a min-p that the level lies below it; where zero cuts,
    all are candidates. ROUND_LEVELS is the power of two that holds LEVELS + 1.
    """
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if tl.load(temperature_ptr + row) > 0:
        level, chunk_index = tl.arange(0, ROUND_LEVELS), tl.arange(0, BLOCK_CHUNKS)
        at = (row * (LEVELS + 1) + level[:, None]) * chunks + chunk_index[None, :]
        inside = (level[:, None] <= LEVELS) & (chunk_index[None, :] < chunks)
        counts = tl.load(counts_ptr + at, inside, 0)
        count, mass = tl.sum(counts, 1), tl.sum(tl.load(mass_ptr + at, inside, 0.0), 1)
        whole = tl.sum(tl.where(level == LEVELS, mass, 0.0), 0)
        top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
        depth = LOWEST * tl.exp2(level.to(tl.float32) * GROWTH)
        # float32 sums are added in another order later
        holds_mass = mass > tl.where(top_p < 1, top_p * whole * 1.0001, float("inf"))
        holds_likely = tl.exp2(-depth * LOG2E) < min_p
        min_count = tl.where(top_k > 0, top_k, vocab)
        others = tl.where(min_count < vocab, vocab + 1, 0)  # a top-k alone decides
        enough = (count >= min_count) | ((holds_mass | holds_likely) & (level >= others))
        chosen = tl.min(tl.where(enough | (level >= LEVELS), level, LEVELS), 0)

        mine = level[:, None] == chosen
        start = tl.sum(tl.sum(tl.where(mine & (chunk_index[None, :] < chunk), counts, 0), 1), 0)
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        x = _scaled(scores_ptr, best_ptr, temperature_ptr, row, token, vocab, chunks, BLOCK_CHUNKS)
        deepest = tl.exp2(tl.cast(chosen, tl.float32) * GROWTH) * -LOWEST
        threshold = tl.where(chosen < LEVELS, deepest, float("-inf"))
        kept = (token < vocab) & (x >= threshold)
        to = row * vocab + start + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(scaled_ptr + to, x, kept)
        tl.store(tokens_ptr + to, token, kept)
        if chunk == 0:
            tl.store(found_ptr + row, tl.sum(tl.where(level == chosen, count, 0), 0))
            tl.store(whole_ptr + row, whole)


def greedy(logits: Tensor) -> SampledTokens:
    """The likeliest token of each row of logits [m, vocab]; the first of equals."""
    return sample(logits, None)


def sample(logits: Tensor, rows: SamplingRows | None) -> SampledTokens:
    """`reference.sample`, where tokens of equal probability are in the order of their ids; rows None: `greedy`.

    Nothing is read on the host and no launch depends on a value, so that it can be captured in a CUDA graph. The tokens
    are marked in `rows.seen`.
    """
    checks.device("sample", logits, *(rows or ()))
    m = len(logits)
    tokens, logprobs = logits.new_empty(m, dtype=torch.int64), logits.new_empty(m, dtype=torch.float32)
    for launch in _plan(logits, rows, tokens, logprobs):
        launch.run()
    return SampledTokens(tokens, logprobs)


def _plan(logits: Tensor, rows: SamplingRows | None, tokens: Tensor, logprobs: Tensor) -> list[Launch]:
    m, vocab = logits.shape
    checks.tensor("sample", "logits", logits, (m, vocab))
    if rows is not None:
        _check_rows(rows, m, vocab)
    chunks = cdiv(vocab, CHUNK)
    sizes: Arguments = {"vocab": vocab, "chunks": chunks}
    scores, scaled = (logits.new_empty(m, vocab, dtype=torch.float32) for _ in range(2))
    tops, masses, best = (logits.new_empty(m, chunks, dtype=torch.float32) for _ in range(3))
    ids, found = logits.new_empty(m, chunks, dtype=torch.int32), logits.new_empty(m, dtype=torch.int32)
    whole = logits.new_empty(m, dtype=torch.float32)
    ranked = logits.new_empty(m, vocab, dtype=torch.int32)
    penalty, slots, seen, bias, allowed = (None,) * 5 if rows is None else rows[5:]
    marks = ids if seen is None else seen.view(torch.uint8)
    scored: Arguments = {"scores_ptr": scores, "best_ptr": best}
    most = triton.next_power_of_2(chunks)
    launches = [Launch(
        score_kernel, (chunks, m),
        {"logits_ptr": logits, "penalty_ptr": _or(penalty, scores), "slots_ptr": _or(slots, ids),
         "seen_ptr": marks, "bias_ptr": _or(bias, scores), "allowed_ptr": _or(allowed, ids),
         "tops_ptr": tops, "masses_ptr": masses, "ids_ptr": ids, **scored, **sizes, "words": cdiv(vocab, 32)},
        {"PENALTY": seen is not None, "BIAS": bias is not None, "MASK": allowed is not None, "CHUNK": CHUNK},
    )]  # fmt: skip
    if rows is not None:
        counts = logits.new_empty(m, LEVELS + 1, chunks, dtype=torch.int32)
        mass = logits.new_empty(m, LEVELS + 1, chunks, dtype=torch.float32)
        levels: Arguments = {"temperature_ptr": rows.temperature, "counts_ptr": counts, "mass_ptr": mass}
        levels |= scored | sizes
        cuts: Arguments = {"top_k_ptr": rows.top_k, "top_p_ptr": rows.top_p, "min_p_ptr": rows.min_p}
        constants = {"CHUNK": CHUNK, "BLOCK_CHUNKS": most, "LEVELS": LEVELS}
        candidates: Arguments = {"scaled_ptr": scaled, "tokens_ptr": ranked, "found_ptr": found, "whole_ptr": whole}
        launches += [
            Launch(level_kernel, (chunks, m), levels, constants),
            Launch(gather_kernel, (chunks, m), levels | cuts | candidates,
                   constants | {"ROUND_LEVELS": triton.next_power_of_2(LEVELS + 1)}),
        ]  # fmt: skip
    names = ("temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "uniform_ptr")
    picked: Arguments = dict(zip(names, [scores] * 5 if rows is None else rows[:5], strict=True))
    launches.append(Launch(
        pick_kernel, (m,),
        {"logits_ptr": logits, "scaled_ptr": scaled, "tokens_ptr": ranked, "found_ptr": found, "whole_ptr": whole,
         "best_ptr": best, "ids_ptr": ids, "tops_ptr": tops, "masses_ptr": masses, "slots_ptr": _or(slots, ids),
         "seen_ptr": marks, "chosen_ptr": tokens, "logprobs_ptr": logprobs, **picked, **sizes},
        {"BLOCK_CHUNKS": most, "BLOCK": 1024, "DRAWS": rows is not None, "PENALTY": seen is not None},
    ))  # fmt: skip
    return launches


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer for an argument that the kernel does not look at."""
    return other if tensor is None else tensor


def _check_rows(rows: SamplingRows, m: int, vocab: int) -> None:
    dtypes = {"top_k": torch.int32, "uniform": torch.float64}
    for name in ("temperature", "top_k", "top_p", "min_p", "uniform"):
        checks.tensor("sample", name, getattr(rows, name), (m,), dtypes.get(name, torch.float32))
    if (rows.seen is None) != (rows.penalty is None):
        raise ValueError("sample: one of penalty and seen is None; expected both or neither")
    if rows.slots is None and (rows.seen is not None or rows.bias is not None):
        raise ValueError("sample: slots is None; expected int64 [m], the rows of seen and bias")
    for name, value, shape, dtype in (
        ("penalty", rows.penalty, (m,), torch.float32), ("slots", rows.slots, (m,), torch.int64),
        ("seen", rows.seen, (None, vocab), torch.bool), ("bias", rows.bias, (None, vocab), torch.float32),
        ("allowed", rows.allowed, (m, cdiv(vocab, 32)), torch.int32),
    ):  # fmt: skip
        if value is not None:
            checks.tensor("sample", name, value, shape, dtype)


def aot_specs(capability: int) -> list[Spec]:
    """16 rows of 151936 logits, drawn with a penalty, and the likeliest of one row."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    vocab, m = 151936, 16
    floats = empty(m)
    rows = SamplingRows(
        floats, empty(m, dtype=torch.int32), floats, floats, empty(m, dtype=torch.float64), floats,
        empty(m, dtype=torch.int64), empty(m, vocab, dtype=torch.bool),
    )  # fmt: skip
    logits = empty(m, vocab, dtype=torch.bfloat16)
    names = ("scores", "levels", "candidates", "pick")
    moved = (7 * m * vocab, 4 * m * vocab, 4 * m * vocab, 8 * m * 2048)
    plan = _plan(logits, rows, empty(m, dtype=torch.int64), floats)
    specs = [Spec(f"sampling {name}, {m} rows", launch, n) for name, launch, n in zip(names, plan, moved, strict=True)]
    plan = _plan(logits[:1], None, empty(1, dtype=torch.int64), floats[:1])
    specs.append(Spec("greedy scores, 1 row", plan[0], 6 * vocab))
    specs.append(Spec("greedy pick, 1 row", plan[1], 12 * cdiv(vocab, CHUNK)))
    return specs
