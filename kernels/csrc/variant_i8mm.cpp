// NEON with products of int8 matrices and of bfloat16 pairs.
#include "simd/neon.h"

#include "variant.inl"

const Entry* entries_i8mm() { return kEntries; }
