// All kernels and their names, for the SIMD lanes that the including file chooses.
#include "library.h"

#include "common.h"

#include "linear/trial.inl"

#include "linear/dots.inl"

#if defined(QVL_OWN_DOTS)
#include QVL_OWN_DOTS
#endif

#include "linear/quantize.inl"

#include "linear/int8.inl"

#if defined(__AMX_BF16__)
#include "linear/dense_amx.inl"
#endif

#include "linear/exact.inl"

#include "linear/dense.inl"

#include "norms.inl"

#include "rotary.inl"

#include "attention/job.inl"

#include "attention/decode.inl"

#include "attention/rows.inl"

#include "attention/float.inl"

#if defined(__AMX_BF16__)
#include "attention/amx.inl"

#include "attention/decode_amx.inl"
#endif

#include "attention/attention.inl"

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
