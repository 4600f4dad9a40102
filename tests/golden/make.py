"""Derive the committed goldens from a full golden folder: `python tests/golden/make.py ../shared/golden`.

What is left out, and why, is in README.md of this folder. Tensors are copied; where rows are dropped, the rows that are
kept are named in the file.
"""

from __future__ import annotations

import argparse
import json
import shutil
from base64 import b64encode
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).parent
STAGE_STEP = 8  # rows of an intermediate result of the vision encoder: every eighth is kept
RANKS = 1024  # of the tiny vocabulary, so that the special tokens get the ids of the original
AS_THEY_ARE = (
    "gptq_layers.json", "ntk_alpha_table.json", "pos_embed.safetensors", "lm_v_incremental.safetensors",
    "lm_v2_incremental.safetensors", "lm_vi2_left_padded_long.safetensors", "lm_vii_batch_images.safetensors",
)  # fmt: skip
CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")
QUANTIZED = (".qweight", ".qzeros", ".scales", ".g_idx", ".bias")


def vocabulary() -> str:
    """A made vocabulary: 256 bytes, then pairs of letters, digits and blanks. Nothing of the published one is in it."""
    letters, digits = "abcdefghijklmnopqrstuvwxyz", "0123456789"
    pairs = chain(product(letters, letters), product(" ", letters), product(digits, digits))
    tokens = [bytes([value]) for value in range(256)] + ["".join(pair).encode() for pair in pairs]
    return "".join(f"{b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens[:RANKS]))


def checkpoint(source: Path, name: str) -> None:
    """The configuration and a made vocabulary; the tensors in files of at most 4 MB."""
    target = HERE / name
    target.mkdir(exist_ok=True)
    for file in (*CONFIGS, "quantize_config.json"):
        if (source / name / file).is_file():
            shutil.copyfile(source / name / file, target / file)
    (target / "qwen.tiktoken").write_text(vocabulary())
    state: dict[str, Tensor] = {}
    for path in (source / name).glob("*.safetensors"):
        state |= load_file(path)
    if name == "tiny-int4":  # its floats are those of tiny, rounded to float16: conftest.py adds them again
        floats = load_file(source / "tiny" / "model.safetensors")
        assert all(torch.equal(floats[key].half(), tensor) for key, tensor in state.items() if key in floats)
        kept = {key: tensor for key, tensor in state.items() if key not in floats}
        save_file(kept, target / "quantized.safetensors")
        shutil.copyfile(source / name / "model.safetensors.index.json", target / "model.safetensors.index.json")
        return
    parts = {1: {k: t for k, t in state.items() if ".h." in k}, 2: {k: t for k, t in state.items() if ".h." not in k}}
    weight_map: dict[str, Any] = {}
    for number, part in parts.items():
        file = f"model-{number:05}-of-00002.safetensors"
        save_file(part, target / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def features(source: Path) -> None:
    """The vision encoder's output for both photos, and rows of its last stages for the first.

    No stage before the resampler: the photo can be rebuilt from those, from the patch projection to 32 dB.
    """
    vision = load_file(source / "vision.safetensors")
    stages = [f"a.{name}" for name in ("attn_pool", "ln_post", "final")]
    save_file({name: vision[name][:, ::STAGE_STEP].contiguous() for name in stages}, HERE / "vision.safetensors")
    first, second = vision["encode_ab"]
    save_file({"images/beach.jpg": first.contiguous(), "images/city.png": second.contiguous()},
              HERE / "image_features.safetensors")  # fmt: skip


def thinned(source: Path) -> None:
    """Files of which some rows or tensors are enough."""
    text = load_file(source / "lm_i_text20.safetensors")
    save("lm_i_text20", text, [name for name in text if not name.startswith("rope")])
    one = load_file(source / "lm_ii_one_image.safetensors")
    at = one["logits_positions"]
    hidden = {name: one[name][:, at].contiguous() for name in ("embed", "block0", "block1", "block2", "final_hidden")}
    hidden |= {"hidden_positions": at.clone(), "logits_positions": at, "logits": one["logits"], "ids": one["ids"]}
    save_file(hidden, HERE / "lm_ii_one_image.safetensors")
    two, every = load_file(source / "lm_iii_two_images.safetensors"), slice(None, None, 4)
    save_file({"ids": two["ids"], "logits_positions": two["logits_positions"][every].contiguous(),
               "logits": two["logits"][:, every].contiguous(),
               "final_hidden_at_positions": two["final_hidden_at_positions"][:, every].contiguous()},
              HERE / "lm_iii_two_images.safetensors")  # fmt: skip
    long, every = load_file(source / "lm_iv_long.safetensors"), slice(None, None, 5)
    kept = {name: long[name] for name in long if name not in ("layer0.k_rot", "logits", "logits_positions")}
    kept["logits"], kept["logits_positions"] = (
        long["logits"][:, every].contiguous(), long["logits_positions"][every].contiguous()
    )  # fmt: skip
    save_file(kept, HERE / "lm_iv_long.safetensors")
    batch = load_file(source / "lm_vi_left_padded.safetensors")
    save("lm_vi_left_padded", batch, [name for name in batch if name not in ("logits", "last_logits")])
    int4 = load_file(source / "lm_int4.safetensors")
    save("lm_int4", int4, [name for name in int4 if name != "ii_logits_dequant_rounded_to_fp16"])
    variants = load_file(source / "lm_variants.safetensors")
    kept = {}
    for name, tensor in variants.items():  # every third position
        kept[name] = (tensor[::3] if name.endswith("positions") else tensor[:, ::3]).contiguous()
    save_file(kept, HERE / "lm_variants.safetensors")
    layers = load_file(source / "gptq_layers.safetensors")
    kept = {name: layers[name] for name in layers if not name.endswith((".dequant_fp32", ".dequant_fp16", ".weight"))}
    for case in ("g128_sym", "g64_asym_actorder"):
        kept[f"{case}.dequant_fp32_every_16th_row"] = layers[f"{case}.dequant_fp32"][::16].contiguous()
    save_file(kept | {"g128_sym.weight": layers["g128_sym.weight"]}, HERE / "gptq_layers.safetensors")
    answers = json.loads((source / "generation.json").read_text())
    ids = {key: answers[key] for key in answers if not key.startswith(("chat", "forced"))}
    for answer in ids.values():
        answer.pop("decoded_new", None)  # text of the published vocabulary
    (HERE / "generation.json").write_text(json.dumps(ids) + "\n")


def save(name: str, tensors: dict[str, Tensor], kept: list[str]) -> None:
    save_file({key: tensors[key] for key in kept}, HERE / f"{name}.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the full golden folder")
    source = parser.parse_args().source
    for name in ("tiny", "tiny-int4"):
        checkpoint(source, name)
    features(source)
    thinned(source)
    for file in AS_THEY_ARE:
        shutil.copyfile(source / file, HERE / file)
    size = sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file())
    print(f"{HERE}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
