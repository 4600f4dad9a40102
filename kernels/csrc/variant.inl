// All kernels, for the lanes that the including file has chosen, and their names.
#include "library.h"

#include "common.h"

#include "quantize.inl"

#include "linear_int8.inl"

#include "linear_float.inl"

#include "norms.inl"

#include "attention.inl"

#include "ceiling.inl"

namespace {

const Entry kEntries[] = {
    {"linear_int8", (void*)linear_int8},
    {"linear_exact", (void*)linear_exact},
    {"linear_dense", (void*)linear_dense},
    {"dequantize", (void*)dequantize},
    {"rms_norm", (void*)rms_norm},
    {"layer_norm", (void*)layer_norm},
    {"swiglu", (void*)swiglu},
    {"gelu", (void*)gelu},
    {"rotary_to_cache", (void*)rotary_to_cache},
    {"paged_attention", (void*)paged_attention},
    {"read_memory", (void*)read_memory},
    {nullptr, nullptr},
};

}  // namespace
