// The library's interface: kernels are looked up by instruction set and name, and called through plain C pointers.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <utility>  // for types alone: see common.h

// Increase it when the meaning of a kernel's arguments changes: a layout, or their order. Python checks it.
constexpr int64_t kAbi = 5;

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

// The arguments of a kernel, a letter each: P a pointer, i an integer, d a double. Python checks them against its own.
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

// Calls a kernel with recorded arguments.
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

// One list for each variant that was compiled, ended by a null name. If the compiler cannot build a variant, setup.py
// leaves it out and tells library.cpp with QVL_NO_AMX, QVL_NO_I8MM and so on.
const Entry* entries_amx();  // null if the system does not grant the tile registers
const Entry* entries_avx512();
const Entry* entries_avxvnni();
const Entry* entries_avx2();
const Entry* entries_i8mm();
const Entry* entries_dotprod();
const Entry* entries_neon();
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
// Whether kernels check their arguments: see checked.h.
QVL_EXPORT int64_t qvl_checked(void);
// Instruction sets that were compiled and that this CPU and system can run, best first, separated by spaces.
QVL_EXPORT const char* qvl_instruction_sets(void);
// The kernel `name` for one of them, or null; `arguments`, unless null, is set to its letters.
QVL_EXPORT void* qvl_kernel(const char* instruction_set, const char* name, const char** arguments);
// The same kernel as an entry for `qvl_replay`.
QVL_EXPORT const Entry* qvl_entry(const char* instruction_set, const char* name);

struct Call {
  const Entry* kernel;
  const Argument* arguments;
};
// Runs recorded calls in order.
QVL_EXPORT void qvl_replay(const Call* calls, int64_t count);
}
