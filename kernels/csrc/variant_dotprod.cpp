// NEON with dot products of int8.
#include "simd/neon.h"

#include "variant.inl"

const Entry* entries_dotprod() { return kEntries; }
