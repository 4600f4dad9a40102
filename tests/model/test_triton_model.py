"""The whole model on the GPU's kernels, in Triton's interpreter: float16 against what the original computes in float32.

The bound is that of `test_precision`: our distance from the original may be twice that of plain torch at the same
precision, as root mean squares. Each case is one model call or two, as the interpreter takes seconds for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qvl_kernels import UnsupportedError, ops_for
from qvl_runtime.model.language import Observer, unobserved
from qvl_runtime.model.rotary import ntk_alpha
from qvl_runtime.prompt.chatml import ImageSpan
from qvl_runtime.prompt.images import load_image
from qvl_runtime.schedule.runner import Chunk, Span
from tests.model.oracle import Oracle, spelled_images, without_padding

pytestmark = [pytest.mark.cpu, pytest.mark.interpreter]


class Pair(NamedTuple):
    """A checkpoint in float16 on the kernels under test and in plain torch."""

    ours: Oracle
    plain: Oracle


@pytest.fixture(scope="module", params=["tiny", "tiny-int4"])
def pair(request: pytest.FixtureRequest, golden: Path) -> Iterator[Pair]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QVL_KERNELS", "reference")
        plain = Oracle(golden, request.param, torch.float16)
        patch.setenv("QVL_KERNELS", "triton")
        try:
            ops_for(torch.device("cpu"))
        except UnsupportedError as fault:
            pytest.skip(str(fault))
        yield Pair(Oracle(golden, request.param, torch.float16), plain)


def no_worse(pair: Sequence[Tensor], want: Tensor, name: str) -> None:
    """pair: ours and plain torch's, of the same inputs; want: the original's, in float32."""
    error, yardstick = (float((got.float() - want).square().mean().sqrt()) for got in pair)
    assert pair[0].dtype == torch.float16 and pair[0].shape == want.shape
    assert 0 < error <= 2 * yardstick, f"{name}: rms error {error:.2e}, plain torch {yardstick:.2e}"


def test_pictures_batches_and_length(pair: Pair, golden: Path) -> None:
    """One call: a text, a text past seq_length with its own NTK factor, a picture in a prompt. Then a step of each."""
    quantised = pair.ours.config.quantization is not None
    long, picture = load_file(golden / "lm_iv_long.safetensors"), load_file(golden / "lm_ii_one_image.safetensors")
    text = load_file(golden / "lm_i_text20.safetensors")
    int4 = load_file(golden / "lm_int4.safetensors")
    prompts = [file["ids"][0].tolist() for file in (text, long, picture)]
    assert [ntk_alpha(pair.ours.config, len(ids)) for ids in prompts] == [1, 7, 15]
    got = list(zip(*(oracle.prefill(*prompts) for oracle in pair), strict=True))
    at = picture["logits_positions"]
    if quantised:  # no word of the original's on the second
        no_worse(got[0], int4["i_logits"][0], "text")
        no_worse([x[at] for x in got[2]], int4["ii_logits"][0], "picture")
    else:
        no_worse(got[0], text["logits"][0], "text")
        no_worse(got[1], long["logits"][0], "past seq_length")
        no_worse([x[at] for x in got[2]], picture["logits"][0], "picture")


def test_decoding_in_a_batch(pair: Pair, golden: Path) -> None:
    """Three lengths prefilled together, one of them in two chunks, then decoded together."""
    if pair.ours.config.quantization is not None:
        pytest.skip("the original's word on batches is for the float checkpoint")
    want = load_file(golden / "lm_vi_left_padded.safetensors")
    prompts, found = without_padding(want["ids"], want["attention_mask"]), []
    for oracle in pair:
        chunks = [oracle.chunk(ids) for ids in prompts]
        first, *others = chunks
        oracle.runner.run([first._replace(token_ids=first.token_ids[:9]), *others])
        oracle.runner.run([first._replace(token_ids=first.token_ids[9:])])
        step = [Chunk(c.sequence, ids.tolist()) for c, ids in zip(chunks, want["next_ids"], strict=True)]
        found.append(oracle.runner.compute(step)([0, 1, 2]))
        for chunk in chunks:
            chunk.sequence.close()
    no_worse(found, want["next_step_logits"], "next step")


def test_a_prefix_that_is_found(pair: Pair, golden: Path) -> None:
    """The picture's keys come from the cache: only what follows is computed."""
    file, name = ("lm_int4", "ii_") if pair.ours.config.quantization is not None else ("lm_ii_one_image", "")
    want, found = load_file(golden / f"{file}.safetensors"), []
    ids = want[f"{name}ids"][0].tolist()
    tail = 8
    for oracle in pair:
        (image,) = spelled_images(ids, oracle.config)
        shown = load_image(oracle.root / image.path, oracle.config.visual.image_size)
        spans = [ImageSpan(image.start, oracle.config.visual.n_queries, shown)]
        (features,) = oracle.runner.features([shown])
        alpha = ntk_alpha(oracle.config, len(ids))
        with oracle.cache.sequence(alpha) as first, oracle.cache.sequence(alpha) as second:
            oracle.runner.run([Chunk(first, ids, [Span(image.start, features)])])
            first.publish(ids, spans)
            assert second.find_prefix(ids, spans) == 288 and second.blocks[:18] == first.blocks[:18]
            found.append(oracle.model.logits(oracle.runner.run([Chunk(second, ids[288:])])[-tail:]))
    positions = want[f"{name}logits_positions"].tolist()
    at = [positions.index(p) for p in range(len(ids) - tail, len(ids))]
    no_worse(found, want[f"{name}logits"][0, at], "after the prefix")


def test_the_tower(pair: Pair, golden: Path) -> None:
    """Intermediates of the picture's way, so that a fault is found where it is."""
    if pair.ours.config.quantization is not None:
        pytest.skip("the tower is the same in both checkpoints")
    want = load_file(golden / "vision.safetensors")
    seen: list[dict[str, Tensor]] = [{}, {}]
    for oracle, own in zip(pair, seen, strict=True):
        watch: Observer = own.__setitem__
        own["final"] = oracle.model.encode_pictures(want["a.pixels"][None], watch)
    for part in ("ln_pre", "block0.attn", "block0", "block1", "attn_pool", "final"):
        no_worse([own[part][0] for own in seen], want[f"a.{part}"][0], part)


def test_nobody_watching_changes_nothing(pair: Pair) -> None:
    """The way that is taken in earnest, without observers, gives what the observed one gives."""
    ids, results = [5, 6, 7, 8, 9], []
    for observe in (unobserved, lambda name, value: None):
        with pair.ours.cache.sequence(1.0) as sequence:
            results.append(pair.ours.runner.run([Chunk(sequence, ids)], observe))
    assert torch.equal(*results)
