// The face of the library: kernels are looked up by instruction set and name, and called through plain C pointers.
#pragma once
#include <stdint.h>

struct Entry {
  const char* name;
  void* function;
};

// One list for each variant that was compiled in, ended by a null name.
const Entry* entries_amx();  // null where the system does not give the tile registers
const Entry* entries_avx512();
const Entry* entries_avx2();
const Entry* entries_portable();
const Entry* entries_pack();  // not compute-bound: compiled once

#if defined(__GNUC__)
#define QVL_EXPORT __attribute__((visibility("default")))
#else
#define QVL_EXPORT
#endif

extern "C" {
// Instruction sets that are compiled in and that this CPU and system run, best first, separated by spaces.
QVL_EXPORT const char* qvl_instruction_sets(void);
// The kernel `name` for one of them, or null.
QVL_EXPORT void* qvl_kernel(const char* instruction_set, const char* name);
}
