"""Train the nano checkpoint that ships with the package: `python -m tools.train_nano --minutes 104`.

Draws its own images, learns its own vocabulary and trains on two cores. A stopped run resumes from the state in
`--folder`, where the log (log.jsonl) and the scores (scores.jsonl) are written too. With `--export` it
does not train but writes the checkpoint in the published layout, in bfloat16 and as GPTQ Int4; with `--plot`, the
training curve.

With `--from DIR` a run starts from the weights and the vocabulary of a checkpoint, with a fresh optimizer and its own
schedule, in its own folder. docs/nano.md has the flags of the second run, whose weights are shipped.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.prompt.tokenizer import Tokenizer
from tools.nano.curve import plot
from tools.nano.export import export
from tools.nano.scenes import check_fonts
from tools.nano.team import Team
from tools.nano.trainer import Recipe, Trainer, parameters
from tools.nano.vocabulary import RANKS, corpus, learn_ranks, write_ranks
from tools.nano.warm import take_vocabulary

CONFIG: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "bf16": True,
    "fp16": False,
    "fp32": False,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "kv_channels": 64,
    "intermediate_size": 1024,
    "vocab_size": 1152,
    "seq_length": 2048,
    "max_position_embeddings": 8192,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "tokenizer_type": "QWenTokenizer",
    "torch_dtype": "bfloat16",
    "attn_dropout_prob": 0.0,
    "emb_dropout_prob": 0.0,
    "use_cache": True,
    "visual": {
        "image_size": 144,
        "patch_size": 12,
        "width": 192,
        "layers": 4,
        "heads": 3,
        "mlp_ratio": 4.0,
        "output_dim": 256,
        "image_start_id": RANKS + 214,
        "n_queries": 64,
    },
}


def prepare(folder: Path, start: Path | None = None) -> Tokenizer:
    """Write config.json and qwen.tiktoken into the folder, if they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    if start is not None:
        take_vocabulary(start, folder)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    vocabulary = folder / "qwen.tiktoken"
    if not vocabulary.exists():
        write_ranks(learn_ranks(corpus()), vocabulary)
    return Tokenizer.from_folder(folder, CONFIG["visual"]["n_queries"])


def main() -> None:
    """Train, or export and plot a finished run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/nano"), help="state, log and scores (default: %(default)s)"
    )
    parser.add_argument("--from", type=Path, dest="start", metavar="DIR", help="start from this checkpoint's weights")
    for f in fields(Recipe):
        parser.add_argument(
            "--" + f.name.replace("_", "-"), type=type(f.default), default=f.default, help="default: %(default)s"
        )
    parser.add_argument(
        "--export", type=Path, metavar="DIR", help="do not train: write DIR and DIR_int4 from the state"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="do not train: draw the curve of the logs")
    args = vars(parser.parse_args())
    folder, target, image = args.pop("folder"), args.pop("export"), args.pop("plot")
    start = args.pop("start")
    if image is not None:
        plot(folder, image)
    if target is not None:
        for written in export(folder, target):
            print(f"{written}: {sum(f.stat().st_size for f in written.iterdir()) / 1e6:.1f} MB")
    if image is not None or target is not None:
        return
    check_fonts()
    tokenizer = prepare(folder, start)
    recipe = replace(Recipe(), **args)
    config = ModelConfig.from_dict(CONFIG)
    team = Team(recipe.processes, parameters(config))
    team.run(lambda member: Trainer(folder, config, tokenizer, recipe, member, start).run())


if __name__ == "__main__":
    main()
