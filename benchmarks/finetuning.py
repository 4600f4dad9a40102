"""Measure training steps: `python -m benchmarks.finetuning`, the published table of LoRA and Q-LoRA on this machine.

On a GPU the models have the published sizes and random weights; on a CPU it is nano. Each cell is an iteration of 8
micro-batches of one sample with one image, as in the published table: seconds, tokens per second, and on a GPU the
memory that is allocated and reserved, next to what `qvl plan --finetune` computes. Features of images are computed in
each iteration (`--cached`: once). A line also has the rate of a square matrix product, by which cards are compared.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.engine.engine import NANO
from qvl_runtime.finetune.functions import Documents
from qvl_runtime.finetune.memory import training_memory
from qvl_runtime.finetune.network import Network, Targets
from qvl_runtime.finetune.opening import build_network, prepare
from qvl_runtime.finetune.optimizer import Optimizer
from qvl_runtime.finetune.options import FinetuneOptions
from qvl_runtime.formats.adapter import AdapterConfig
from qvl_runtime.host import device_name
from qvl_runtime.weights.loader import load_weights
from qvl_runtime.weights.synthetic import synthetic_config, synthetic_weights

ACCUMULATE, LENGTHS = 8, (384, 512, 1024, 2048)
WHOLE = AdapterConfig(modules_to_save=("wte", "lm_head"))
ROWS: dict[str, tuple[str, FinetuneOptions]] = {
    "LoRA (Base)": ("qwen-vl-chat", FinetuneOptions(lora=WHOLE, masters="bfloat16")),
    "LoRA (Chat)": ("qwen-vl-chat", FinetuneOptions()),
    "Q-LoRA": ("qwen-vl-chat-int4", FinetuneOptions(method="qlora")),
}
# GB and seconds an iteration at the four lengths, as published: A100-80G, CUDA 11.8, torch 2.0, flash-attention 2.
PUBLISHED = {
    "LoRA (Base)": ((37.1, 2.3), (37.3, 2.4), (38.7, 3.6), (38.7, 6.1)),
    "LoRA (Chat)": ((23.3, 2.2), (23.6, 2.3), (25.1, 3.5), (27.3, 5.9)),
    "Q-LoRA": ((17.0, 4.2), (17.2, 4.5), (18.2, 5.5), (19.3, 7.9)),
}


def network_of(name: str, options: FinetuneOptions, device: torch.device) -> Network:
    """A network of the published size with random weights, or nano on a CPU."""
    nano = ModelConfig.from_folder(NANO)
    if device.type == "cpu":
        folder = NANO if options.method != "qlora" else NANO.with_name("nano_int4")
        config = ModelConfig.from_folder(folder)
        weights = load_weights(folder, config, torch.bfloat16, device)
    else:
        config = synthetic_config(name, nano)
        weights = synthetic_weights(config, torch.bfloat16, device)
    network = build_network(config, _split(dict(weights.state)), weights.packed)
    prepare(network, options)
    return network.train()


def _split(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with w1 and w2 apart, as views, where they are merged for the engine's kernels."""
    for name in [name for name in state if ".up_gate." in name]:
        for part, half in zip(("w1", "w2"), state.pop(name).chunk(2), strict=True):
            state[name.replace("up_gate", part)] = half
    return state


def iteration(network: Network, optimizer: Optimizer, tokens: int, features: Tensor | None) -> None:
    """Eight micro-batches and an update."""
    c, device, dtype = network.c, network.visual.proj.device, network.visual.proj.dtype
    size = c.visual.image_size
    for _ in range(ACCUMULATE):
        images = features
        if images is None:
            with torch.no_grad():
                images = network.visual(torch.randn(1, 3, size, size, device=device, dtype=dtype))
        ids = torch.randint(0, c.visual.image_start_id, (1, tokens), device=device)
        targets = Targets(torch.arange(tokens - 1, device=device), ids[0, 1:])
        slots, positions = torch.tensor([[0, 1, 0]], device=device), torch.arange(tokens, device=device)[None]
        loss = network(ids, images, slots, positions, Documents((0, tokens)), targets).learned
        (loss / (ACCUMULATE * tokens)).backward()
    optimizer.step(1e-5)


def measure(row: str, tokens: int, device: torch.device, warm: int, timed: int, cached: bool) -> dict[str, Any]:
    """One cell of the table."""
    name, options = ROWS[row]
    if device.type == "cpu":
        options = replace(options, checkpointing=False)
    network = network_of(name, options, device)
    optimizer = Optimizer(network.named_parameters(), options)
    features = None
    if cached:
        size = network.c.visual.image_size
        with torch.no_grad():
            features = network.visual(torch.randn(1, 3, size, size, device=device, dtype=torch.bfloat16))
    seconds = []
    for number in range(warm + timed):
        if device.type == "cuda" and number == warm:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        iteration(network, optimizer, tokens, features)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    typical = median(seconds[warm:])
    cell: dict[str, Any] = {
        "row": row,
        "tokens": tokens,
        "seconds": round(typical, 3),
        "tokens_per_s": round(ACCUMULATE * tokens / typical),
        "planned_GB": round(training_memory(network.c, options, tokens, micro_batches=2).total / 1e9, 2),
        "cached_features": cached,
    }
    if device.type == "cuda":
        cell["allocated_GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        cell["reserved_GB"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
        published = dict(zip(LENGTHS, PUBLISHED[row], strict=True)).get(tokens)
        if published is not None:
            cell["published_GB"], cell["published_seconds"] = published
    return cell


def matmul_rate(device: torch.device) -> float:
    """TFLOP/s of a square product in bfloat16, 8192 wide on a GPU."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / median(seconds[1:]) / 1e12


def main() -> None:
    """Print one JSON line a cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), help="default: all")
    parser.add_argument("--lengths", nargs="+", type=int, default=[384, 2048, 512, 1024], help="tokens of a sample")
    parser.add_argument("--warm", type=int, default=5, help="iterations before the timed ones (default: %(default)s)")
    parser.add_argument("--timed", type=int, default=10, help="timed iterations (default: %(default)s)")
    parser.add_argument("--cached", action="store_true", help="images are encoded once, as from the second epoch on")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    header = {"device": device_name(device), "torch": torch.__version__, "matmul_TFLOPs": round(matmul_rate(device), 2)}
    print(json.dumps(header), flush=True)
    for tokens in args.lengths:
        for row in args.rows:
            print(json.dumps(measure(row, tokens, device, args.warm, args.timed, args.cached)), flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
