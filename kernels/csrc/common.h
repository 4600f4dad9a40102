// Shared by all kernels of a variant: loads and stores of each dtype, tails, exp and erf. The including file chooses the
// SIMD lanes. Do not include the C++ library here: the linker might keep the copy of an inline function that one file
// compiled for AVX-512, and use it for all.
#pragma once
#include <stdint.h>
#include <string.h>

#include "checked.h"
#include "threads.h"

namespace {

enum Dtype : int64_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kInt8 = 3 };

inline int64_t size_of(int64_t dtype) { return dtype == kFloat32 ? 4 : dtype == kInt8 ? 1 : 2; }
inline const void* at(const void* p, int64_t dtype, int64_t i) { return (const char*)p + i * size_of(dtype); }
inline void* at(void* p, int64_t dtype, int64_t i) { return (char*)p + i * size_of(dtype); }

// 16 elements from index i. The branch is well predicted and costs nothing next to the memory access.
inline F load_as(const void* p, int64_t dtype, int64_t i) {
  if (dtype == kFloat32) return load((const float*)p + i);
  return dtype == kBfloat16 ? load_bf16((const uint16_t*)p + i) : load_f16((const uint16_t*)p + i);
}
inline void store_as(void* p, int64_t dtype, int64_t i, F x) {
  if (dtype == kFloat32) store((float*)p + i, x);
  else if (dtype == kBfloat16) store_bf16((uint16_t*)p + i, x);
  else store_f16((uint16_t*)p + i, x);
}
// The first n < 16 of them; the rest reads as zero and is not written.
inline F load_part(const void* p, int64_t dtype, int64_t i, int64_t n) {
  alignas(64) char line[64] = {0};
  memcpy(line, at(p, dtype, i), (size_t)(n * size_of(dtype)));
  return load_as(line, dtype, 0);
}
inline void store_part(void* p, int64_t dtype, int64_t i, F x, int64_t n) {
  alignas(64) char line[64];
  store_as(line, dtype, 0, x);
  memcpy(at(p, dtype, i), line, (size_t)(n * size_of(dtype)));
}
inline F load_upto(const void* p, int64_t dtype, int64_t i, int64_t n) {
  return n >= 16 ? load_as(p, dtype, i) : load_part(p, dtype, i, n);
}
inline void store_upto(void* p, int64_t dtype, int64_t i, F x, int64_t n) {
  if (n >= 16) store_as(p, dtype, i, x);
  else store_part(p, dtype, i, x, n);
}
// x, rounded as a store to `dtype` rounds it.
inline F rounded(F x, int64_t dtype) {
  if (dtype == kFloat32) return x;
  alignas(64) char line[64];
  store_as(line, dtype, 0, x);
  return load_as(line, dtype, 0);
}

// max |x| of n floats, a multiple of 16; NaN if one is not finite. `max` alone loses NaN, and the int8 values that a lost
// one is rounded to would be an answer.
inline float largest(const float* x, int64_t n) {
  F top = zero(), lost = zero();
  for (int64_t i = 0; i < n; i += 16) {
    const F value = load(x + i);
    top = max(top, abs(value));
    lost = fma(value, zero(), lost);
  }
  return highest(top) + sum(lost);
}

// e^x with a relative error below 2e-7: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Taylor's, degree 7).
// min and max return their second argument if one is NaN, so x is the second: the exponential of NaN is NaN.
inline F exp(F x) {
  x = max(set1(-87.0f), min(set1(88.0f), x));
  I n = nearest(mul(x, set1(1.44269504f)));
  F r = fma(to_float(n), set1(-0.693359375f), x);  // ln 2 in two parts, so that the product is exact
  r = fma(to_float(n), set1(2.12194440e-4f), r);
  F p = set1(1.0f / 5040);
  p = fma(p, r, set1(1.0f / 720));
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return mul(p, power_of_two(n));
}

// 2^x for x <= 0 with a relative error below 2e-7; below 2^-126 it stays there. In fewer steps than e^x. NaN gives NaN.
inline F exp2(F x) {
  x = max(set1(-126.0f), x);
  I n = nearest(x);
  F r = sub(x, to_float(n));
  F p = set1(1.52527338e-5f);
  p = fma(p, r, set1(1.54035304e-4f));
  p = fma(p, r, set1(1.33335581e-3f));
  p = fma(p, r, set1(9.61812911e-3f));
  p = fma(p, r, set1(5.55041087e-2f));
  p = fma(p, r, set1(0.240226507f));
  p = fma(p, r, set1(0.693147181f));
  p = fma(p, r, set1(1.0f));
  return mul(p, power_of_two(n));
}

// erf(x) with an absolute error below 4e-7: Abramowitz and Stegun 7.1.26.
inline F erf(F x) {
  F size = abs(x), t = reciprocal(fma(size, set1(0.3275911f), set1(1.0f)));
  F p = set1(1.061405429f);
  p = fma(p, t, set1(-1.453152027f));
  p = fma(p, t, set1(1.421413741f));
  p = fma(p, t, set1(-0.284496736f));
  p = fma(p, t, set1(0.254829592f));
  F tail = mul(mul(p, t), exp2(mul(mul(size, size), set1(-1.44269504f))));
  return copysign(sub(set1(1.0f), tail), x);
}

}  // namespace
