"""The Int4 checkpoint against what the original computes with its weights dequantized in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qvl_kernels import reference
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.model.language import Decoder
from qvl_runtime.model.linear import LinearBuilder
from qvl_runtime.model.rotary import Frequencies, ntk_alpha, positions_of
from qvl_runtime.schedule.kv_cache import KVCache, layout_of
from qvl_runtime.schedule.runner import Chunk
from qvl_runtime.weights.checkpoint import load_state
from qvl_runtime.weights.packing import pack_decoder
from tests.model.oracle import LOGITS, Oracle, close

pytestmark = pytest.mark.cpu


def test_text(tiny_int4: Oracle, golden: Path) -> None:
    want = load_file(golden / "lm_int4.safetensors")
    close(tiny_int4.prefill(want["i_ids"][0].tolist())[0], want["i_logits"][0], LOGITS, "logits")


def test_one_image(tiny_int4: Oracle, golden: Path) -> None:
    want = load_file(golden / "lm_int4.safetensors")
    got, at = tiny_int4.observed(want["ii_ids"][0].tolist()), want["ii_logits_positions"]
    close(got["final_hidden"][at], want["ii_final_hidden_at_positions"][0], LOGITS, "final_hidden")
    close(got["logits"][at], want["ii_logits"][0], LOGITS, "logits")


def test_greedy(tiny_int4: Oracle, golden: Path) -> None:
    want = load_file(golden / "lm_int4.safetensors")
    chunk, made = tiny_int4.chunk(want["ii_ids"][0].tolist()), []
    with chunk.sequence as sequence:
        for _ in range(32):
            logits = tiny_int4.model.logits(tiny_int4.runner.run([chunk])[-1:])
            made.append(int(logits.argmax()))
            chunk = Chunk(sequence, made[-1:])
    assert made == want["ii_greedy32"].tolist()


def test_weights_stay_packed(tiny_int4: Oracle) -> None:
    """The five linears of a block take 4 bits a weight and their scales, not 16."""
    c = tiny_int4.config
    weights = c.num_hidden_layers * (4 * c.hidden_size**2 + 3 * c.hidden_size * c.ffn_width)
    packed = tiny_int4.model.bytes_by_part["language"]
    assert weights / 2 < packed < weights


def test_the_decoder_alone(committed_golden: Path) -> None:
    """Without runner and engine, on plain torch: the layers, their caches and the head."""
    folder, want = committed_golden / "tiny-int4", load_file(committed_golden / "lm_int4.safetensors")
    config, cpu = ModelConfig.from_folder(folder), torch.device("cpu")
    state = load_state(folder, config, torch.float32)
    packed = pack_decoder(state, config, reference)
    decoder = Decoder(config, LinearBuilder(reference, state, "exact", packed))
    cache, frequencies, ids = KVCache(config, 64, torch.float32, cpu), Frequencies(config, cpu), want["i_ids"][0]
    with cache.sequence(ntk_alpha(config, len(ids))) as sequence:
        sequence.append(len(ids))
        at, layout = layout_of([sequence], [len(ids)])
        positions = positions_of(config, at, frequencies.table[frequencies.row(sequence.alpha)])
        x = decoder.forward(decoder.embedding[ids], positions, layout, cache.layers)
    close(decoder.logits(x), want["i_logits"][0], LOGITS, "logits")
