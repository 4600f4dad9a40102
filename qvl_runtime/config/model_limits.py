"""The largest values of a configuration, far beyond any published model.

Layers are counted and sizes multiplied before a weight is looked for: what a damaged or hostile config.json says must
not become a loop without an end.
"""

from __future__ import annotations

from collections.abc import Mapping

MOST_WIDTH, MOST_LAYERS = 1 << 20, 1024
MOST_CONTEXT = 1 << 24  # positions are float32 where they are rotated: whole up to here
MOST_DOUBLINGS = 14  # of the training length: the rotary tables hold 16 NTK factors
MOST: Mapping[str, float] = {
    "num_hidden_layers": MOST_LAYERS,
    "hidden_size": MOST_WIDTH,
    "intermediate_size": 2 * MOST_WIDTH,
    "vocab_size": 1 << 24,
    "seq_length": MOST_CONTEXT,
    "max_position_embeddings": MOST_CONTEXT,
    "rotary_emb_base": 1e18,
    "layer_norm_epsilon": 1.0,
}
MOST_VISUAL: Mapping[str, float] = {
    "layers": MOST_LAYERS,
    "width": MOST_WIDTH,
    "output_dim": MOST_WIDTH,
    "mlp_ratio": 64.0,
    "image_size": 8192,
    "n_queries": 1 << 14,
    "positional_rows": 1 << 20,
    "layer_norm_eps": 1.0,
}
