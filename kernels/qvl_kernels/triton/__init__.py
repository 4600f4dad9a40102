"""GPU kernels in Triton, with the names and signatures of `qvl_kernels.reference`.

One op per file, in this order:

1. constants;
2. the jit kernel: its formula, shapes and packing in the docstring; load, compute in float32, round once at the store;
3. its configuration, a plain function of (capability, shape), so that nothing is tuned at start;
4. `_plan(tensors, configuration) -> Launch`, which touches no data, and the public op, which validates with
   `checks`, allocates its output and runs the plan; a packed linear keeps its plans (`linear/linears.py`);
5. `aot_specs(capability) -> list[Spec]`: the plans of this file at the published model's shapes, made of tensors on
   torch's meta device, with the bytes that each must move, so that the kernel report judges what a GPU runs.

`qvl_kernels.aot` collects the lists. A kernel takes its dtype from its pointers: tests run float16, since Triton's
interpreter computes bfloat16 wrongly. Comments next to a kernel give the rules that its machine code imposed.

The layout of packed weights is `qvl_kernels.layouts.gpu`, made by `repack` in plain torch, which needs no Triton.
"""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("triton") is None:
    raise ImportError(
        "qvl_kernels.triton needs the package triton, which is not installed here: pip install 'qvl-runtime[cuda]', or"
        " `make setup` in a checkout; qvl_kernels.reference offers the same ops in plain torch"
    )

from qvl_kernels.reference import (
    SCALE_BYTES,
    BoundLinear,
    Packed,
    Precision,
    SampledTokens,
    SamplingRows,
    cache_width,
    concat_outputs,
    embedding,
    gptq_dequantize,
    gptq_linear,
    rotary_tables,
    rotate_half,
    unpack_rows,
)
from qvl_kernels.triton.activations import gelu, swiglu
from qvl_kernels.triton.attention.kv_tiles import from_cached, to_cached
from qvl_kernels.triton.attention.paged import paged_attention
from qvl_kernels.triton.attention.rotary import rotary_to_cache
from qvl_kernels.triton.attention.rotary_attention import rotary_attention
from qvl_kernels.triton.attention.vision import cross_attention, vision_attention
from qvl_kernels.triton.linear.linears import (
    LAYOUTS,
    bind,
    linear,
    pack_gptq,
    prepare_gptq,
    prepare_linear,
    unpack_to_qweight,
)
from qvl_kernels.triton.linear.split_sum import sum_partials
from qvl_kernels.triton.norms import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from qvl_kernels.triton.sampling.sample import greedy, sample

__all__ = [
    "LAYOUTS",
    "SCALE_BYTES",
    "BoundLinear",
    "Packed",
    "Precision",
    "SampledTokens",
    "SamplingRows",
    "add_layer_norm",
    "add_rms_norm",
    "bind",
    "cache_width",
    "concat_outputs",
    "cross_attention",
    "embedding",
    "from_cached",
    "gelu",
    "gptq_dequantize",
    "gptq_linear",
    "greedy",
    "layer_norm",
    "linear",
    "pack_gptq",
    "paged_attention",
    "prepare_gptq",
    "prepare_linear",
    "rms_norm",
    "rotary_attention",
    "rotary_tables",
    "rotary_to_cache",
    "rotate_half",
    "sample",
    "sum_partials",
    "swiglu",
    "to_cached",
    "unpack_rows",
    "unpack_to_qweight",
    "vision_attention",
]
