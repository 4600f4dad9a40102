#include "simd/avx2.h"

#include "variant.inl"

const Entry* entries_avx2() { return kEntries; }
