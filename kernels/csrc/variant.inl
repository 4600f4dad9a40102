// All kernels, for the lanes that the including file has chosen, and their names.
#include "library.h"

#include "common.h"

#include "quantize.inl"

#include "linear_int8.inl"

#if defined(__AMX_BF16__)
#include "dense_amx.inl"
#endif

#include "linear_float.inl"

#include "norms.inl"

#include "rotary.inl"

#include "attention_job.inl"

#include "attention_decode.inl"

#include "attention_rows.inl"

#include "attention_float.inl"

#if defined(__AMX_BF16__)
#include "attention_amx.inl"
#endif

#include "attention.inl"

#include "greedy.inl"

#include "ceiling.inl"

namespace {

const Entry kEntries[] = {
    QVL_ENTRY(linear_int8),
    QVL_ENTRY(linear_exact),
    QVL_ENTRY(linear_dense),
    QVL_ENTRY(dequantize),
    QVL_ENTRY(rms_norm),
    QVL_ENTRY(layer_norm),
    QVL_ENTRY(swiglu),
    QVL_ENTRY(gelu),
    QVL_ENTRY(rotary_to_cache),
    QVL_ENTRY(attention),
    QVL_ENTRY(greedy),
    QVL_ENTRY(read_memory),
    QVL_END,
};

}  // namespace
