"""The ops on a CPU, on the C++ kernels of csrc/: the names and signatures of `qvl_kernels.reference`."""

from __future__ import annotations

from qvl_kernels.cpu.attention import (
    cross_attention,
    paged_attention,
    rotary_attention,
    vision_attention,
)
from qvl_kernels.cpu.dense import (
    linear,
)
from qvl_kernels.cpu.linears import (
    LAYOUTS,
    bind,
    pack_gptq,
    prepare_gptq,
    prepare_linear,
    unpack_to_qweight,
)
from qvl_kernels.cpu.ops import (
    add_layer_norm,
    add_rms_norm,
    concat_outputs,
    embedding,
    gelu,
    greedy,
    layer_norm,
    rms_norm,
    rotary_tables,
    rotary_to_cache,
    sample,
    swiglu,
)
from qvl_kernels.reference import (
    BoundLinear,
    Packed,
    Precision,
    SampledTokens,
    SamplingRows,
    cache_width,
    from_cached,
    gptq_dequantize,
    gptq_linear,
    rotate_half,
    sum_partials,
    to_cached,
    unpack_rows,
)

__all__ = [
    "LAYOUTS",
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
