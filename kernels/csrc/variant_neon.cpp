// NEON of any 64-bit ARM.
#include "simd/neon.h"

#include "variant.inl"

const Entry* entries_neon() { return kEntries; }
