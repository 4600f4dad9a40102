"""The whole model on the GPU's kernels, in Triton's interpreter: float16 against what the original computes in float32.

The bound is that of `test_precision`: our distance from the original may be twice that of plain torch at the same
precision, as root mean squares. Few calls serve many cases: a row takes the interpreter some 50 ms.
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
from qvl_runtime.prompt.chatml import ImageSpan
from qvl_runtime.prompt.images import load_image
from qvl_runtime.schedule.kv_cache import BLOCK_SIZE
from qvl_runtime.schedule.runner import Chunk
from tests.interpreter import patch_language_once
from tests.model.oracle import Oracle, spelled_images, without_padding
from tests.schedule.fake_graphs import FakeCapture

pytestmark = [pytest.mark.cpu, pytest.mark.interpreter]


PROMPTS = ("lm_i_text20", "lm_iv_long", "lm_ii_one_image")


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
        patch_language_once()
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


TAIL = 8  # tokens computed after a prefix that was found
PREFIX = 288  # tokens of whole blocks before them, the picture's among them


class Results(NamedTuple):
    """Logits of one checkpoint on one module of ops."""

    text: Tensor
    long: Tensor | None  # past seq_length
    picture: Tensor
    after_prefix: Tensor  # the last rows of the picture's prompt, the rest found in the cache
    next_step: Tensor | None  # of three prompts that decode together, one of them prefilled in two chunks


def compute(oracle: Oracle, golden: Path) -> Results:
    """A text, one past seq_length and one with a picture in a call; a prefix that is found; decoding in a batch.

    Without the second and the last for the Int4 checkpoint, for which there is no word of the original's on them.
    """
    packed = oracle.config.quantization is not None
    text, long, picture = (load_file(golden / f"{name}.safetensors")["ids"][0].tolist() for name in PROMPTS)
    prompts = [text, picture] if packed else [text, picture, long]
    (image,) = spelled_images(picture, oracle.config)
    shown = load_image(oracle.root / image.path, oracle.config.visual.image_size)
    spans = [ImageSpan(image.start, oracle.config.visual.n_queries, shown)]
    chunks = [oracle.chunk(ids) for ids in prompts]
    found = oracle.model.logits(oracle.runner.run(chunks)).split([len(ids) for ids in prompts])
    first = chunks[1].sequence
    first.publish(picture, spans)
    with oracle.cache.sequence(first.alpha) as second:
        assert second.find_prefix(picture, spans) == PREFIX and second.blocks == first.blocks[: PREFIX // BLOCK_SIZE]
        after = oracle.model.logits(oracle.runner.run([Chunk(second, picture[PREFIX:])])[-TAIL:])
    for chunk in chunks:
        chunk.sequence.close()
    if packed:
        return Results(found[0], None, found[1], after, None)
    return Results(found[0], found[2], found[1], after, decode_together(oracle, golden))


def decode_together(oracle: Oracle, golden: Path) -> Tensor:
    want = load_file(golden / "lm_vi_left_padded.safetensors")
    chunks = [oracle.chunk(ids) for ids in without_padding(want["ids"], want["attention_mask"])]
    first, *others = chunks
    oracle.runner.run([first._replace(token_ids=first.token_ids[:9]), *others])
    oracle.runner.run([first._replace(token_ids=first.token_ids[9:])])
    step = [Chunk(c.sequence, ids.tolist()) for c, ids in zip(chunks, want["next_ids"], strict=True)]
    logits = oracle.runner.compute(step)([0, 1, 2])
    for chunk in chunks:
        chunk.sequence.close()
    return logits


def test_near_the_original(pair: Pair, golden: Path) -> None:
    ours, plain = (compute(oracle, golden) for oracle in pair)
    picture = load_file(golden / f"{PROMPTS[2]}.safetensors")
    positions = picture["logits_positions"]
    if pair.ours.config.quantization is not None:
        want = load_file(golden / "lm_int4.safetensors")
        no_worse((ours.text, plain.text), want["i_logits"][0], "text")
        shown = want["ii_logits"][0]
    else:
        no_worse((ours.text, plain.text), load_file(golden / f"{PROMPTS[0]}.safetensors")["logits"][0], "text")
        shown = picture["logits"][0]
        long, batch = (load_file(golden / f"{name}.safetensors") for name in (PROMPTS[1], "lm_vi_left_padded"))
        for got, torchs, wanted, name in (
            (ours.long, plain.long, long["logits"][0], "past seq_length"),
            (ours.next_step, plain.next_step, batch["next_step_logits"], "decoding"),
        ):
            assert got is not None and torchs is not None
            no_worse((got, torchs), wanted, name)
    no_worse((ours.picture[positions], plain.picture[positions]), shown, "picture")
    at = [positions.tolist().index(p) for p in range(len(ours.picture) - TAIL, len(ours.picture))]
    no_worse((ours.after_prefix, plain.after_prefix), shown[at], "after the prefix")


def test_graphs(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode step with padding, by a graph of these kernels: nothing in it reads a value, and it gives the same."""
    runner = pair.ours.runner
    capture = FakeCapture(pair.ours.model.ops, monkeypatch)
    monkeypatch.setattr("qvl_runtime.schedule.decode_graphs.BUCKETS", (4,))
    runner.capture(capture, 4, 64)
    monkeypatch.setattr(runner, "graphs", runner.graphs)
    sequences, found = [runner.cache.sequence(1.0), runner.cache.sequence(3.0)], []
    for length, sequence in zip((5, 19), sequences, strict=True):
        runner.run([Chunk(sequence, [*range(length)])])
    for _ in range(2):
        found.append(runner.compute([Chunk(sequence, [7]) for sequence in sequences])([0, 1]).clone())
        for length, sequence in zip((5, 19), sequences, strict=True):
            sequence.truncate(length)
        runner.graphs = None
    for sequence in sequences:
        sequence.close()
    kernels = {call.op for call in capture.captured[0]}
    assert {"rotary_kernel", "rms_norm_kernel", "swiglu_kernel"} < kernels
    gap = (found[0].float() - found[1].float()).abs().max()
    assert gap <= 2**-8 * found[1].float().abs().max(), "further apart than a few roundings of float16"


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
