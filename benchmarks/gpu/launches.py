"""The launches of one decoder layer in a decode step, as they happen: `python -m benchmarks.gpu.launches`.

A model of two layers of the published widths runs a step in which launches are recorded and not executed, so it needs
no GPU, and no numbers in its packed weights. A layer is everything between one merge of attention and the next. torch's
own kernels count as well, by operator.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qvl_kernels.layouts.gpu import TILE, PackedInt4
from qvl_kernels.layouts.interleave import WORDS
from qvl_kernels.reference import Packed
from qvl_kernels.util import cdiv
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.model.language import LayerCache, Layout
from qvl_runtime.model.qwen_vl import QwenVL, Step
from qvl_runtime.weights.packed_specs import PackedSpec, decoder_groups, packed_specs
from qvl_runtime.weights.synthetic import GROUP, SyntheticState

MAKES_NO_KERNEL = ("empty", "detach", "_local_scalar_dense")  # torch's operators without a kernel, besides views


class Recorded(NamedTuple):
    """A launch: its kernel, or torch's operator, and the bytes of its tensors, which bound what it moves."""

    kernel: str
    programs: int  # 0 for torch's
    nbytes: int


@contextmanager
def record_launches(run: bool = True) -> Iterator[list[Recorded]]:
    """Record every launch inside the block; Triton's are executed only with `run`."""
    from qvl_kernels.triton.launch import Launch

    seen: list[Recorded] = []
    original = Launch.run

    def record(launch: Launch) -> None:
        tensors = {t.data_ptr(): t for t in launch.arguments.values() if isinstance(t, Tensor)}
        seen.append(Recorded(launch.kernel.__name__, math.prod(launch.grid), sum(t.nbytes for t in tensors.values())))
        if run:
            with torch.utils._python_dispatch._disable_current_modes():
                original(launch)

    class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.__name__.partition(".")[0]
            made = func(*args, **(kwargs or {}))
            if not func.is_view and not any(part in name for part in MAKES_NO_KERNEL) and made is not None:
                tensors = [t for t in (*args, made) if isinstance(t, Tensor)]
                seen.append(Recorded(f"torch {name}", 0, sum(t.nbytes for t in tensors)))
            return made

    with patch.object(Launch, "run", record), Operators():  # type: ignore[no-untyped-call]
        yield seen


def of_a_layer(seen: list[Recorded]) -> list[Recorded]:
    """The launches between the first merge of attention and the second."""
    turns = [i for i, launch in enumerate(seen) if launch.kernel == "merge_kernel"]
    if len(turns) < 2:
        raise RuntimeError(f"{len(turns)} merges were launched; expected those of at least two layers")
    return seen[turns[0] : turns[1]]


def two_layers(config: ModelConfig) -> QwenVL:
    """A model of the widths of `config`, in 4 bits: two layers, and a vision encoder that is made in no time."""
    visual = replace(config.visual, layers=1, width=416, heads=4, n_queries=4)
    small = replace(config, num_hidden_layers=2, vocab_size=2048, visual=visual)
    specs = packed_specs(small, "keep", "keep")
    packed = {name: _empty_weight(specs[name]) for name, _ in decoder_groups(small)}
    return QwenVL(small, SyntheticState(small, torch.float16), packed=packed)


def _empty_weight(spec: PackedSpec) -> Packed:
    tiles, groups = spec.inputs // TILE, spec.inputs // GROUP
    words = torch.empty(tiles, spec.outputs, WORDS, dtype=torch.int32)
    scales = torch.empty(groups, spec.outputs, dtype=torch.float16)
    weight = PackedInt4(words, scales, zeros=None, perm=None, inputs=spec.inputs, outputs=spec.outputs, group=GROUP)
    return weight.as_packed(1, torch.empty(spec.outputs, dtype=torch.float16) if spec.bias else None)


def decode_step(model: QwenVL, rows: int, context: int) -> list[Recorded]:
    """A layer's launches in a step of `rows` requests after `context` tokens."""
    small, blocks = model.config, cdiv(context, 16)
    shape = (blocks + 1, small.num_attention_heads, 16, small.kv_channels)
    caches = [LayerCache(torch.empty(shape, dtype=torch.float16), torch.empty(shape, dtype=torch.float16))] * 2
    ones = torch.ones(rows, dtype=torch.int64)
    layout = Layout(ones, torch.zeros(rows, blocks, dtype=torch.int64), torch.arange(rows + 1), ones * context)
    step = Step(ones, ones, torch.ones(rows, small.rotary_dim // 2), layout)
    with record_launches(run=False) as seen:
        model.forward(step, caches)
    return of_a_layer(seen)


def main() -> None:
    """Print the launches of a decoder layer for 1 and 16 rows."""
    os.environ["TRITON_INTERPRET"], os.environ["QVL_KERNELS"] = "1", "triton"  # recorded, never run
    from benchmarks.gpu.bounds import full_config

    model = two_layers(full_config("qwen-vl-chat-int4"))
    counted = {rows: decode_step(model, rows, 2048) for rows in (1, 16)}
    if "--json" in sys.argv[1:]:
        print(json.dumps([{"rows": rows, **seen._asdict()} for rows, launches in counted.items() for seen in launches]))
        return
    for rows, launches in counted.items():
        print(f"\n{len(launches)} launches a layer, Int4, {rows} row{'s' * (rows > 1)} after 2048 tokens:\n")
        print("| kernel | programs | MB of its tensors |\n|---|---:|---:|")
        for launch in launches:
            print(f"| {launch.kernel} | {launch.programs or ''} | {launch.nbytes / 1e6:.3f} |")


if __name__ == "__main__":
    main()
