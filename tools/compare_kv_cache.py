"""Compare an int8 KV cache with one in the model's dtype: `python -m tools.compare_kv_cache [--scenes 100]`.

Prints one JSON line each for the bytes per token, the logits' error, the greedy tokens that agree, and nano's scores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from qvl_runtime import Engine
from qvl_runtime.engine.engine import NANO
from tools.nano.asking import ask
from tools.nano.scenes import SceneConfig
from tools.nano.scoring import score


def noise_prompt(engine: Engine, seed: int) -> dict[str, Any]:
    """Return token ids around one image of 32 x 32 pixels of colored noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)
    ids = [*range(9), engine.tokenizer.img_start, engine.tokenizer.img_end, *range(20 + 9 * seed)]
    return {"token_ids": ids, "images": [Image.fromarray(pixels)]}


def scene_scores(engine: Engine, scenes: int) -> dict[str, float]:
    """Return nano's scores on fresh scenes, in percent."""
    config = SceneConfig(side=engine.config.visual.image_size)
    tally = score(lambda *args: ask(engine, *args), config, scenes)
    return {name: 100 * rate for name, rate in tally.rates.items()}


def logits_error(reference: list[torch.Tensor], logits: list[torch.Tensor]) -> dict[str, float]:
    """Return how far logits are from the reference, and the share of rows whose likeliest token agrees."""
    pairs = list(zip(reference, logits, strict=True))
    error = torch.cat([(a - b).flatten() for a, b in pairs])
    return {
        "logits_error_rms": float(error.square().mean().sqrt()),
        "logits_error_max": float(error.abs().max()),
        "logits_spread": float(torch.cat([a.flatten() for a in reference]).std()),
        "same_likeliest": float(torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in pairs]).float().mean()),
        "rows": len(torch.cat(reference)),
    }


def main() -> None:
    """Print the figures of both caches, and the int8 cache's error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=NANO, help="checkpoint folder (default: the shipped nano)")
    parser.add_argument("--scenes", type=int, default=100, help="scenes to score, 0 for none (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps({"model": args.model.name, "threads": args.threads, "torch": torch.__version__}))
    logits: dict[str, list[torch.Tensor]] = {}
    for kv_dtype in ("auto", "int8"):
        engine = Engine(args.model, max_model_len=2048, kv_dtype=kv_dtype)
        scored = (engine.score(noise_prompt(engine, i), return_logits=True).logits for i in range(8))
        logits[kv_dtype] = [part for part in scored if part is not None]
        scores = scene_scores(engine, args.scenes) if args.scenes else {}
        kv_bytes = engine.report()["memory"]["kv_per_token"]
        print(json.dumps({"kv_dtype": kv_dtype, "bytes_per_token": kv_bytes, "scenes": args.scenes, **scores}))
    dtype = engine.engine_config.dtype
    print(json.dumps({"int8_kv_against": dtype, **logits_error(logits["auto"], logits["int8"])}))


if __name__ == "__main__":
    main()
