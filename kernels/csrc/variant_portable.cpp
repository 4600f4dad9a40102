#include "simd/portable.h"

#include "variant.inl"

const Entry* entries_portable() { return kEntries; }
