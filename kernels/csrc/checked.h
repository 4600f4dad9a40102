// Checks of sizes and indices at the entry of a kernel, in builds with QVL_CHECKED (`make asan`, `make ubsan`): a fault
// ends the process with a line that names it, also where the address would be one of another tensor, which a sanitizer
// takes for right. In other builds Python has checked the same before it passed an address, and these cost nothing.
#pragma once
#include <stdint.h>

#if defined(QVL_CHECKED)
#include <stdio.h>
#include <stdlib.h>
#define QVL_CHECK(condition)                                                                    \
  ((condition) ? (void)0                                                                        \
               : (fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition), abort()))
#else
#define QVL_CHECK(condition) ((void)sizeof(condition))  // used, and not computed
#endif

namespace {

// Each of `count` numbers is in [low, high). No numbers: a null pointer.
template <class T> inline void check_range(const T* numbers, int64_t count, int64_t low, int64_t high) {
#if defined(QVL_CHECKED)
  for (int64_t i = 0; numbers && i < count; i++) QVL_CHECK(numbers[i] >= low && numbers[i] < high);
#else
  (void)numbers, (void)count, (void)low, (void)high;
#endif
}

// The sizes and the permutation of a packed weight, as linear/int8.inl describes it.
inline void check_packed(int64_t bits, int64_t group, int64_t inputs, int64_t padded, int64_t outputs, const int32_t* perm) {
  QVL_CHECK(bits == 4 || bits == 8);
  QVL_CHECK(group >= 32 && group <= 128 && group % 32 == 0);
  QVL_CHECK(inputs > 0 && inputs <= padded && padded % group == 0);
  QVL_CHECK(outputs > 0);
  check_range(perm, padded, -1, inputs);
}

}  // namespace
