"""The whole model on the GPU's kernels, in Triton's interpreter: float16 against what the original computes in float32.

The bound is that of `test_precision`: our distance from the original may be twice that of plain torch at the same
precision, as root mean squares. A row takes the interpreter 0.13 s, and 0.25 s in Int4, so that few calls serve many
cases: a text in chunks is prefill and few rows of packed weights, and a prompt with an image goes past seq_length.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qvl_kernels import UnsupportedError, ops_for
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.convert.convert import ConvertOptions, convert
from qvl_runtime.engine.engine import NANO
from qvl_runtime.errors import CheckpointError
from qvl_runtime.model.cache_layout import BLOCK_SIZE
from qvl_runtime.model.language import Observer, unobserved
from qvl_runtime.model.rotary import ntk_alpha
from qvl_runtime.prompt.chatml import ImageSpan
from qvl_runtime.schedule.runner import Chunk, Span
from tests.interpreter import dot_in_one_order, patch_language_once
from tests.model.oracle import Oracle, spelled_images, without_padding
from tests.schedule.fake_graphs import FakeCapture
from tests.stand_ins import shown

pytestmark = [pytest.mark.cpu, pytest.mark.interpreter]

CHUNK = 17  # rows of a first chunk: more than the 16 that int4 weights take at the speed of memory
PREFIX = 288  # tokens of whole blocks that are found, the image's among them
TAIL = 8  # tokens computed after them that are compared


class Pair(NamedTuple):
    """A checkpoint in float16 on the kernels under test and in plain torch, and in float32 in plain torch.

    The last stands in for the original where that has not spoken; `test_int4_golden` holds it to the original.
    """

    ours: Oracle
    plain: Oracle
    exact: Oracle

    @property
    def in_float16(self) -> tuple[Oracle, Oracle]:
        return self.ours, self.plain

    @property
    def packed(self) -> bool:
        return self.ours.config.quantization is not None


@pytest.fixture(scope="module", params=["tiny", "tiny-int4"])
def pair(request: pytest.FixtureRequest, one_golden: Path) -> Iterator[Pair]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QVL_KERNELS", "reference")
        plain, exact = (Oracle(one_golden, request.param, dtype) for dtype in (torch.float16, torch.float32))
        patch.setenv("QVL_KERNELS", "triton")
        try:
            ops_for(torch.device("cpu"))
        except UnsupportedError as fault:
            pytest.skip(str(fault))
        patch_language_once(patch)
        yield Pair(Oracle(one_golden, request.param, torch.float16), plain, exact)


def no_worse(found: Sequence[Tensor], want: Tensor, name: str) -> None:
    """found: ours and plain torch's, of the same inputs; want: the original's, in float32."""
    error, yardstick = (float((got.float() - want).square().mean().sqrt()) for got in found)
    assert found[0].dtype == torch.float16 and found[0].shape == want.shape
    assert 0 < error <= 2 * yardstick, f"{name}: rms error {error:.2e}, plain torch {yardstick:.2e}"


def in_chunks(oracle: Oracle, ids: Sequence[int], *chunks: int) -> Tensor:
    """Logits of the first rows of a prompt, computed in `chunks` of that many rows."""
    whole, hidden, start = oracle.chunk(ids), [], 0
    with whole.sequence as sequence:
        for rows in chunks:
            hidden.append(oracle.runner.run([Chunk(sequence, ids[start : start + rows])]))
            start += rows
    return oracle.model.logits(torch.cat(hidden))


def test_a_text_in_chunks(pair: Pair, one_golden: Path) -> None:
    text = load_file(one_golden / "lm_i_text20.safetensors")
    want = load_file(one_golden / "lm_int4.safetensors")["i_logits"] if pair.packed else text["logits"]
    ids = text["ids"][0].tolist()
    no_worse([in_chunks(oracle, ids, CHUNK, len(ids) - CHUNK) for oracle in pair.in_float16], want[0], "text")


def test_decoding_together(pair: Pair, one_golden: Path) -> None:
    """Prompts of three lengths in one call, and one token more of each in another."""
    want = load_file(one_golden / "lm_vi_left_padded.safetensors")
    prompts = without_padding(want["ids"], want["attention_mask"])
    if pair.packed:  # the prompts' length is what takes time
        prompts = [ids[-rows:] for ids, rows in zip(prompts, (3, 7, 8), strict=True)]
    found = []
    for oracle in pair if pair.packed else pair.in_float16:
        chunks = [oracle.chunk(ids) for ids in prompts]
        oracle.runner.run(chunks)
        step = [Chunk(c.sequence, ids.tolist()) for c, ids in zip(chunks, want["next_ids"], strict=True)]
        found.append(oracle.runner.compute(step)([0, 1, 2]))
        for chunk in chunks:
            chunk.sequence.close()
    no_worse(found[:2], found[2] if pair.packed else want["next_step_logits"], "decoding")


def test_an_image_and_a_prefix(pair: Pair, one_golden: Path) -> None:
    """The vision encoder, part by part to locate a fault; a prompt with an image; the end of that prompt again.

    The prompt is longer than seq_length: the rotary base is raised, and log-n scales the later queries.
    """
    text = load_file(one_golden / "lm_ii_one_image.safetensors")
    ids, positions, want = text["ids"][0].tolist(), text["logits_positions"], text["logits"][0]
    assert len(ids) > pair.ours.config.seq_length
    assert positions[-TAIL:].tolist() == [*range(len(ids) - TAIL, len(ids))]
    if pair.packed:
        packed = load_file(one_golden / "lm_int4.safetensors")
        assert torch.equal(packed["ii_ids"], text["ids"]) and torch.equal(packed["ii_logits_positions"], positions)
        want = packed["ii_logits"][0]
        features = [image(pair.plain, ids)] * 2  # the vision encoder is that of the other checkpoint
    else:
        features = vision_features(pair, one_golden, ids)
    results = [with_prefix(oracle, ids, own) for oracle, own in zip(pair.in_float16, features, strict=True)]
    no_worse([whole[positions] for whole, _ in results], want, "image")
    no_worse([after for _, after in results], want[-TAIL:], "after the prefix")


def vision_features(pair: Pair, one_golden: Path, ids: Sequence[int]) -> list[Tensor]:
    """An image's features from both, part for part no worse than plain torch's."""
    vision, size = load_file(one_golden / "vision.safetensors"), pair.exact.config.visual.image_size
    photo = vision.get("a.pixels")
    pixels = torch.randn(3, size, size, generator=torch.Generator().manual_seed(0)) if photo is None else photo
    seen: list[dict[str, Tensor]] = [{}, {}, {}]
    for oracle, own in zip(pair, seen, strict=True):
        watch: Observer = own.__setitem__  # type: ignore[assignment]
        own["final"] = oracle.model.encode_images(pixels[None], watch)
    for part in ("ln_pre", "block0.attn", "block0", "block1", "attn_pool", "final"):
        want = seen[2][part] if photo is None else vision[f"a.{part}"]
        no_worse([own[part][0] for own in seen[:2]], want[0], part)
    if photo is None:  # the photo is not committed; its features are
        return [image(oracle, ids) for oracle in pair.in_float16]
    return [own["final"][0] for own in seen[:2]]


def image(oracle: Oracle, ids: Sequence[int]) -> Tensor:
    """The features of a prompt's one image."""
    (image,) = spelled_images(ids, oracle.config)
    (features,) = oracle.runner.features([shown(oracle.root, image.path, oracle.config.visual.image_size)])
    return features


def with_prefix(oracle: Oracle, ids: Sequence[int], features: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of a prompt with an image, and of its last rows when all before them are found in the cache."""
    (image,) = spelled_images(ids, oracle.config)
    photo = shown(oracle.root, image.path, oracle.config.visual.image_size)
    spans = [ImageSpan(image.start, oracle.config.visual.n_queries, photo)]
    alpha = ntk_alpha(oracle.config, len(ids))
    with oracle.cache.sequence(alpha) as first:
        whole = oracle.model.logits(oracle.runner.run([Chunk(first, ids, [Span(image.start, features)])]))
        first.publish(ids, spans)
        with oracle.cache.sequence(alpha) as second:
            assert second.find_prefix(ids, spans) == PREFIX and second.blocks == first.blocks[: PREFIX // BLOCK_SIZE]
            after = oracle.runner.run([Chunk(second, ids[PREFIX:])])
    return whole, oracle.model.logits(after[-TAIL:])


def test_graphs(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode step with padding, by a graph of these kernels: nothing in it reads a value, and it gives the same."""
    runner = pair.ours.runner
    capture = FakeCapture(pair.ours.model.ops, monkeypatch)
    monkeypatch.setattr("qvl_runtime.schedule.decode_graphs.BUCKETS", (4,))
    runner.capture(capture, 4, 64)
    monkeypatch.setattr(runner, "graphs", runner.graphs)
    sequences, found = [runner.cache.sequence(1.0), runner.cache.sequence(3.0)], []
    for length, sequence in zip((3, 17), sequences, strict=True):
        runner.run([Chunk(sequence, [*range(length)])])
    for _ in range(2):
        found.append(runner.compute([Chunk(sequence, [7]) for sequence in sequences])([0, 1]).clone())
        for length, sequence in zip((3, 17), sequences, strict=True):
            sequence.truncate(length)
        runner.graphs = None
    for sequence in sequences:
        sequence.close()
    kernels = {call.op for call in capture.captured[0]}
    assert {"decode_kv_fp16_kernel", "merge_kernel", "rms_norm_kernel"} < kernels and "rotary_kernel" not in kernels
    gap = (found[0].float() - found[1].float()).abs().max()
    assert gap <= 2**-8 * found[1].float().abs().max(), "further apart than a few roundings of float16"


def with_vision_layers(folder: Path, layers: int) -> Path:
    """nano with only the first blocks of its vision encoder."""
    shutil.copytree(NANO, folder)
    config = json.loads((folder / "config.json").read_text())
    config["visual"]["layers"] = layers
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    block = re.compile(r"resblocks\.(\d+)\.")
    kept = {name: t for name, t in tensors.items() if not (m := block.search(name)) or int(m[1]) < layers}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_folder_made_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vision encoder and head in 8 bits, loaded as stored, match the CPU kernels on the same levels.

    One block of the encoder: the interpreter needs 3 s for each.
    """
    found, whole = {}, ModelConfig.from_folder(NANO).visual
    source = with_vision_layers(tmp_path / "source", 1)
    for target, dtype in (("cpu", torch.float16), ("cpu", torch.float32), ("cuda", torch.float16)):
        monkeypatch.setenv("QVL_KERNELS", "triton" if target == "cuda" else "")
        folder = tmp_path / target
        if not folder.exists():
            convert(source, folder, ConvertOptions(target=target, dtype="float16", vision="int8", head="int8"))
        oracle = Oracle(tmp_path, target, dtype, visual=replace(whole, layers=1))
        kernels = oracle.model.kernels
        assert kernels["head linears"].startswith("int8") and "x int8" in kernels["vision linears"]
        pixels = torch.randn(1, 3, whole.image_size, whole.image_size, generator=torch.Generator().manual_seed(0))
        found[target, dtype] = oracle.model.encode_images(pixels), in_chunks(oracle, [5, 6, 7], 3)
    with pytest.raises(CheckpointError, match="was converted for cpu and cannot run on cuda"):
        Oracle(tmp_path, "cpu", torch.float16)
    (_, plain), (_, exact), (_, ours) = found.items()
    for part, name in enumerate(("features", "text")):
        no_worse([ours[part], plain[part]], exact[part], name)


def test_a_forward_without_observers_is_the_same(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that is taken in earnest, without observers, gives what the observed one gives."""
    dot_in_one_order(monkeypatch)
    ids, results = [5, 6, 7, 8, 9], []
    for observe in (unobserved, lambda name, value: None):
        with pair.ours.cache.sequence(1.0) as sequence:
            results.append(pair.ours.runner.run([Chunk(sequence, ids)], observe))
    assert torch.equal(*results)
