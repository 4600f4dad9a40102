// AVX2 with products of int8 on AVX-VNNI: client CPUs since 2021.
#define QVL_AVX_VNNI
#include "simd/avx2.h"

#include "variant.inl"

const Entry* entries_avxvnni() { return kEntries; }
