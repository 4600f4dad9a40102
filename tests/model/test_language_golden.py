"""The decoder against what the original computes, in float32: intermediates, logits, caches, batches, lengths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qvl_runtime.model.rotary import inverse_frequencies, ntk_alpha, positions_of
from qvl_runtime.schedule.runner import Chunk
from tests.model.oracle import LOGITS, Oracle, close, without_padding

pytestmark = pytest.mark.cpu


def test_text(tiny: Oracle, golden: Path) -> None:
    want = load_file(golden / "lm_i_text20.safetensors")
    got = tiny.observed(want["ids"][0].tolist())
    names = ["embed", "block0", "block1", "block2", "final_hidden", "logits"]
    names += [
        f"layer0.{part}" for part in ("ln_1", "c_attn", "attn_context", "attn_out", "ln_2", "w1", "w2", "mlp_out")
    ]
    for name in names:
        close(got[name], want[name][0], LOGITS, name)
    close(got["layer0.q"], want["layer0.q_rot"][0], LOGITS, "q after rotary, where log-n is 1")


def test_one_image(tiny: Oracle, golden: Path) -> None:
    want = load_file(golden / "lm_ii_one_image.safetensors")
    got = tiny.observed(want["ids"][0].tolist())
    rows = want.get("hidden_positions", torch.arange(len(want["ids"][0])))
    for name in ("embed", "block0", "block1", "block2", "final_hidden"):
        close(got[name][rows], want[name][0], LOGITS, name)
    close(got["logits"][want["logits_positions"]], want["logits"][0], LOGITS, "logits")


def test_two_images(tiny: Oracle, golden: Path) -> None:
    want = load_file(golden / "lm_iii_two_images.safetensors")
    got, at = tiny.observed(want["ids"][0].tolist()), want["logits_positions"]
    close(got["final_hidden"][at], want["final_hidden_at_positions"][0], LOGITS, "final_hidden")
    close(got["logits"][at], want["logits"][0], LOGITS, "logits")


def test_past_seq_length(tiny: Oracle, golden: Path) -> None:
    want = load_file(golden / "lm_iv_long.safetensors")
    ids = want["ids"][0].tolist()
    alpha = ntk_alpha(tiny.config, len(ids))
    assert alpha == want["ntk_alpha"].item() == 7
    close(inverse_frequencies(10000, 64, alpha), want["inv_freq"], 0, "inv_freq")
    at = positions_of(tiny.config, torch.arange(150), inverse_frequencies(10000, 64, alpha))
    close(at.cos, want["rope_cos"], 1e-6, "cos")
    close(at.sin, want["rope_sin"], 1e-6, "sin")
    close(positions_of(tiny.config, torch.arange(151), torch.ones(1)).logn, want["logn"], 1e-6, "logn")
    got = tiny.observed(ids)
    close(got["layer0.q"], want["layer0.q_rot"][0] * want["logn"][:150].view(-1, 1, 1), LOGITS, "q")
    close(got["logits"][want["logits_positions"]], want["logits"][0], LOGITS, "logits")


@pytest.mark.parametrize("name", ["lm_v_incremental", "lm_v2_incremental"])
def test_decoding_keeps_the_prompts_alpha(tiny: Oracle, golden: Path, name: str) -> None:
    """One token at a time across seq_length: log-n moves with the position, alpha does not."""
    want = load_file(golden / f"{name}.safetensors")
    ids, prompt = want["ids"][0].tolist(), want["prefill_len"].item()
    rows = []
    with tiny.cache.sequence(ntk_alpha(tiny.config, prompt)) as sequence:
        assert sequence.alpha == want["ntk_alpha_per_call"][-1]
        rows.append(tiny.runner.run([Chunk(sequence, ids[:prompt])])[-1:])  # type: ignore[index]
        rows += [tiny.runner.run([Chunk(sequence, [token])]) for token in ids[prompt:]]  # type: ignore[index]
        got = tiny.model.logits(torch.cat(rows))
        close(got, want["step_logits"][0], LOGITS, "step logits")
        if "cache_k_layer0" in want:
            table = torch.tensor(sequence.blocks)
            for layer in (0, 2):
                for kind, cache in zip("kv", tiny.cache.layers[layer][:2], strict=True):
                    stored = cache[table].transpose(1, 2).flatten(0, 1)[: len(ids)]
                    close(stored, want[f"cache_{kind}_layer{layer}"][0], LOGITS, f"{kind} cache of layer {layer}")
    full = tiny.prefill(ids)[0][-1]
    close(full, want["full_recompute_last_logits"][0], LOGITS, "in one call, with its own alpha")
    assert (full - got[-1]).abs().max() > 1, "the two alphas differ a lot; equal logits would mean one is ignored"


@pytest.mark.parametrize("name", ["lm_vi_left_padded", "lm_vi2_left_padded_long"])
def test_a_batch_is_each_alone(tiny: Oracle, golden: Path, name: str) -> None:
    """Three lengths in one call give what each gives alone; the original, which pads, only does below seq_length."""
    want = load_file(golden / f"{name}.safetensors")
    prompts = without_padding(want["ids"], want["attention_mask"])
    chunks = [tiny.chunk(ids) for ids in prompts]
    ends = torch.tensor([len(ids) for ids in prompts]).cumsum(0) - 1
    close(tiny.model.logits(tiny.runner.run(chunks)[ends]), want["unpadded_last_logits"], LOGITS, "last logits")
    step = [Chunk(c.sequence, token.tolist()) for c, token in zip(chunks, want["next_ids"], strict=True)]
    next_logits = tiny.model.logits(tiny.runner.run(step))
    for chunk in chunks:
        chunk.sequence.close()
    if name == "lm_vi_left_padded":
        close(next_logits, want["next_step_logits"], LOGITS, "next step")
    alone = [tiny.prefill(ids)[0][-1] for ids in prompts]
    close(torch.stack(alone), want["unpadded_last_logits"], LOGITS, "alone")


def test_a_batch_with_images(tiny: Oracle, golden: Path) -> None:
    want = load_file(golden / "lm_vii_batch_images.safetensors")
    got = tiny.prefill(*without_padding(want["ids"], want["attention_mask"]))
    # Row 0 is padded by 7 in the original, which shifts its log-n; row 1 is not, and is the oracle's word.
    close(got[1][-6:], want["final_tail_logits"][1], LOGITS, "tail")
    close(got[1][-1], want["last_logits"][1], LOGITS, "last logits")
    for logits, ids in zip(got, without_padding(want["ids"], want["attention_mask"]), strict=True):
        close(logits, tiny.prefill(ids)[0], LOGITS, "as alone")


VARIANTS = {
    "no_logn": {"use_logn_attn": False},
    "no_ntk": {"use_dynamic_ntk": False},
    "no_ntk_no_logn": {"use_dynamic_ntk": False, "use_logn_attn": False},
    "rotary_base_5000": {"rotary_emb_base": 5000.0},
    "seq_length_2048": {"seq_length": 2048},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_switches_of_the_config(golden: Path, variant: str) -> None:
    want = load_file(golden / "lm_variants.safetensors")
    oracle = Oracle(golden, "tiny", **VARIANTS[variant])
    for name, file in (("ii", "lm_ii_one_image"), ("iv", "lm_iv_long")):
        ids = load_file(golden / f"{file}.safetensors")["ids"][0].tolist()
        got = oracle.prefill(ids)[0][want[f"{name}_positions"]]
        close(got, want[f"{variant}.{name}_logits"][0], LOGITS, f"{variant}, {name}")


def test_alpha_table(tiny: Oracle, golden: Path) -> None:
    table = json.loads((golden / "ntk_alpha_table.json").read_text())
    assert len(table) > 10
    for entry in table:
        assert ntk_alpha(tiny.config, entry["prefill_length"]) == entry["ntk_alpha"], entry
