#include "simd/avx512.h"

#include "variant.inl"

const Entry* entries_avx512() { return kEntries; }
