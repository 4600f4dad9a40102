// AVX-512 VNNI, with GEMMs on AMX tiles.
#include "simd/avx512.h"

#include "variant.inl"

const Entry* entries_amx() { return amx_granted() ? kEntries : nullptr; }
