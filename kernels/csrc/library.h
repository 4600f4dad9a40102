// The face of the library: kernels are looked up by instruction set and name, and called through plain C pointers.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <utility>  // for types alone: see common.h

// Counts up when what a kernel is given changes its meaning: a layout, an order of arguments. Python asks for it.
constexpr int64_t kAbi = 3;

// One argument of a recorded call (replay.cpp).
union Argument {
  void* pointer;
  int64_t integer;
  double number;
};

struct Entry {
  const char* name;
  void* function;
  void (*run)(const Argument*);  // the function on recorded arguments
  const char* arguments;
};

namespace {

// The arguments of a kernel, a letter each: P a pointer, i an integer, d a double. Python holds them against its own.
template <class T> struct Letter;
template <class T> struct Letter<T*> {
  static constexpr char value = 'P';
  static T* of(const Argument& a) { return (T*)a.pointer; }
};
template <> struct Letter<int64_t> {
  static constexpr char value = 'i';
  static int64_t of(const Argument& a) { return a.integer; }
};
template <> struct Letter<double> {
  static constexpr char value = 'd';
  static double of(const Argument& a) { return a.number; }
};
template <class... Arguments> struct Letters { static constexpr char text[] = {Letter<Arguments>::value..., 0}; };
template <class... Arguments> constexpr const char* letters(void (*)(Arguments...)) { return Letters<Arguments...>::text; }

// A kernel on recorded arguments.
template <auto KERNEL> struct Recorded;
template <class... Arguments, void (*KERNEL)(Arguments...)> struct Recorded<KERNEL> {
  template <size_t... I> static void spread(const Argument* a, std::index_sequence<I...>) {
    KERNEL(Letter<Arguments>::of(a[I])...);
  }
  static void run(const Argument* a) { spread(a, std::index_sequence_for<Arguments...>()); }
};

}  // namespace

#define QVL_ENTRY(function) {#function, (void*)function, Recorded<&function>::run, letters(function)}
#define QVL_END {nullptr, nullptr, nullptr, nullptr}

// One list for each variant that was compiled in, ended by a null name. A compiler that cannot build one leaves it out,
// and library.cpp is told with QVL_NO_AMX, QVL_NO_AVX512 or QVL_NO_AVX2.
const Entry* entries_amx();  // null where the system does not give the tile registers
const Entry* entries_avx512();
const Entry* entries_avx2();
const Entry* entries_portable();
const Entry* entries_pack();  // these two are not compute-bound: compiled once
const Entry* entries_embed();

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
// The same as what `qvl_replay` takes.
QVL_EXPORT const Entry* qvl_entry(const char* instruction_set, const char* name);

struct Call {
  const Entry* kernel;
  const Argument* arguments;
};
// Run recorded calls in their order.
QVL_EXPORT void qvl_replay(const Call* calls, int64_t count);
}
