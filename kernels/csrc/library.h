// The face of the library: kernels are looked up by instruction set and name, and called through plain C pointers.
#pragma once
#include <stdint.h>

// Counts up when what a kernel is given changes its meaning: a layout, an order of arguments. Python asks for it.
constexpr int64_t kAbi = 2;

struct Entry {
  const char* name;
  void* function;
  const char* arguments;
};

namespace {

// The arguments of a kernel, a letter each: P a pointer, i an integer, d a double. Python holds them against its own.
template <class T> struct Letter;
template <class T> struct Letter<T*> { static constexpr char value = 'P'; };
template <> struct Letter<int64_t> { static constexpr char value = 'i'; };
template <> struct Letter<double> { static constexpr char value = 'd'; };
template <class... Arguments> struct Letters { static constexpr char text[] = {Letter<Arguments>::value..., 0}; };
template <class... Arguments> constexpr const char* letters(void (*)(Arguments...)) { return Letters<Arguments...>::text; }

}  // namespace

#define QVL_ENTRY(function) {#function, (void*)function, letters(function)}

// One list for each variant that was compiled in, ended by a null name. A compiler that cannot build one leaves it out,
// and library.cpp is told with QVL_NO_AMX, QVL_NO_AVX512 or QVL_NO_AVX2.
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
QVL_EXPORT int64_t qvl_abi(void);
// Instruction sets that are compiled in and that this CPU and system run, best first, separated by spaces.
QVL_EXPORT const char* qvl_instruction_sets(void);
// The kernel `name` for one of them, or null; `arguments`, where given, is set to its letters.
QVL_EXPORT void* qvl_kernel(const char* instruction_set, const char* name, const char** arguments);
}
