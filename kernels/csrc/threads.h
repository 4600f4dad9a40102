// The thread pool that all kernels share, and scratch memory. Compiled once, for any machine.
#pragma once
#include <stdint.h>

extern "C" {
// Runs f(context, i) for each i below `chunks`, on the pool and the calling thread; returns when all are done.
void qvl_run(int64_t chunks, void (*f)(const void*, int64_t), const void* context);
// At least `bytes` of 64-byte aligned memory, the calling thread's own until it requests the same slot again.
void* qvl_scratch(int slot, int64_t bytes);
int64_t qvl_threads();
int64_t qvl_nanoseconds();  // of a steady clock
int64_t qvl_cache_ways();   // of the L1 data cache; 0 if the system does not tell
// Whether AVX-512 multiplies bfloat16 in pairs where the CPU can: 1, 0, or -1 for what is faster on it, the default.
int64_t qvl_bf16_pairs();
__attribute__((visibility("default"))) void qvl_set_bf16_pairs(int64_t choice);
// From now on chunks of this thread's calls run one after the other, and `log` gets their number and the nanoseconds of
// each, up to `capacity` numbers; null ends it. Returns how many numbers the log that ends here would have had.
__attribute__((visibility("default"))) int64_t qvl_log_chunks(int64_t* log, int64_t capacity);
// Sets how many threads work on a call, the caller included: the number that torch uses.
__attribute__((visibility("default"))) void qvl_set_threads(int64_t count);
}

namespace {

template <class Body> inline void parallel(int64_t chunks, const Body& body) {
  qvl_run(chunks, [](const void* b, int64_t i) { (*(const Body*)b)(i); }, &body);
}

// body(begin, end) over [0, n) in steps of `step`
template <class Body> inline void parallel_ranges(int64_t n, int64_t step, const Body& body) {
  parallel((n + step - 1) / step, [&](int64_t i) { body(i * step, i * step + step < n ? i * step + step : n); });
}

template <class T> inline T* scratch(int slot, int64_t count) { return (T*)qvl_scratch(slot, count * (int64_t)sizeof(T)); }

}  // namespace
