// Sixteen lanes in plain C++, for any machine: it defines the meaning of the names in simd/avx512.h.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

// Put before a loop over an array of vectors. Empty here: the compiler unrolls what fits, and more costs compile time.
#define QVL_UNROLL
#define QVL_UNROLL_SUMS  // before one over sums that must stay in registers

namespace {

constexpr int kDotRows = 2, kDotOutputs = 2;  // of a tile of a dense GEMM, whose lanes are inputs
constexpr int kDotStreams = 4;  // rows of a dense weight that one row is multiplied with at once
constexpr int kHeadLines = 0;  // of a cached vector in decoding: any number
constexpr int kStripRows = 2, kStripVectors = 1;  // of attention
constexpr int kSumOrder[16] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};  // of `sum`: leaves of a binary tree
constexpr int kOneRowStreams = 2;  // blocks that one row is multiplied with at once
constexpr int kFewSums = 1;        // few rows times blocks
constexpr int kTileRows = 4, kTileBlocks = 1;  // of a GEMM tile
constexpr int kHighNibbleShift = 0;

struct F { float v[16]; };
struct I { int32_t v[16]; };
struct Bytes { uint8_t v[64]; };

template <class R, class Op> inline R lanes(Op op) {
  R r;
  for (int i = 0; i < 16; i++) r.v[i] = op(i);
  return r;
}

inline F set1(float x) { return lanes<F>([=](int) { return x; }); }
inline F zero() { return set1(0.0f); }
inline F load(const float* p) { F r; memcpy(r.v, p, sizeof r.v); return r; }
inline void store(float* p, F x) { memcpy(p, x.v, sizeof x.v); }
inline F add(F x, F y) { return lanes<F>([&](int i) { return x.v[i] + y.v[i]; }); }
inline F sub(F x, F y) { return lanes<F>([&](int i) { return x.v[i] - y.v[i]; }); }
inline F mul(F x, F y) { return lanes<F>([&](int i) { return x.v[i] * y.v[i]; }); }
inline F div(F x, F y) { return lanes<F>([&](int i) { return x.v[i] / y.v[i]; }); }
inline F reciprocal(F x) { return div(set1(1.0f), x); }
inline F fma(F x, F y, F z) { return lanes<F>([&](int i) { return x.v[i] * y.v[i] + z.v[i]; }); }
inline void fma_broadcast(F (&acc)[1], const float* x, const F (&w)[1]) { acc[0] = fma(set1(*x), w[0], acc[0]); }  // acc += x * w
inline F max(F x, F y) { return lanes<F>([&](int i) { return x.v[i] > y.v[i] ? x.v[i] : y.v[i]; }); }
inline F min(F x, F y) { return lanes<F>([&](int i) { return x.v[i] < y.v[i] ? x.v[i] : y.v[i]; }); }
inline F abs(F x) { return lanes<F>([&](int i) { return fabsf(x.v[i]); }); }
inline F copysign(F size, F from) { return lanes<F>([&](int i) { return copysignf(size.v[i], from.v[i]); }); }
inline float sum(F x) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) x.v[i] += x.v[i + half];
  return x.v[0];
}
inline float highest(F x) {
  float top = x.v[0];
  for (int i = 1; i < 16; i++) top = x.v[i] > top ? x.v[i] : top;
  return top;
}

inline I iset1(int32_t x) { return lanes<I>([=](int) { return x; }); }
inline I iadd(I x, I y) { return lanes<I>([&](int i) { return x.v[i] + y.v[i]; }); }
inline I isub(I x, I y) { return lanes<I>([&](int i) { return x.v[i] - y.v[i]; }); }
inline I shift_digit(I x) { return lanes<I>([&](int i) { return x.v[i] >> 7; }); }
inline I imul(I x, I y) { return lanes<I>([&](int i) { return x.v[i] * y.v[i]; }); }
inline int32_t isum(I x) {
  int32_t total = 0;
  for (int i = 0; i < 16; i++) total += x.v[i];
  return total;
}
inline I shift_high(I x) { return x; }
inline I nearest(F x) {  // out of range and NaN: the lowest integer, as on x86
  return lanes<I>([&](int i) { return fabsf(x.v[i]) < 2147483648.0f ? (int32_t)lrintf(x.v[i]) : INT32_MIN; });
}
inline F to_float(I x) { return lanes<F>([&](int i) { return (float)x.v[i]; }); }
inline float float_of(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
inline uint32_t bits_of(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
inline F power_of_two(I x) { return lanes<F>([&](int i) { return float_of((uint32_t)(x.v[i] + 127) << 23); }); }
inline I load_u8(const uint8_t* p) { return lanes<I>([&](int i) { return (int32_t)p[i]; }); }
inline I load_i8(const int8_t* p) { return lanes<I>([&](int i) { return (int32_t)p[i]; }); }
inline void store_i8(int8_t* p, I x) { for (int i = 0; i < 16; i++) p[i] = (int8_t)x.v[i]; }

inline float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 0x3ff;
  if (exponent == 31) return float_of(sign | 0x7f800000 | fraction << 13);
  if (exponent == 0) return copysignf((float)fraction * 0x1p-24f, float_of(sign | 0x3f800000));
  return float_of(sign | (exponent + 112) << 23 | fraction << 13);
}
inline uint16_t float_to_half(float x) {  // to nearest, ties to even
  uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (size >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
  if (size < 0x38800000) return (uint16_t)(sign | (uint32_t)lrintf(float_of(size) * 0x1p24f));
  size += 0xfff + (size >> 13 & 1);
  return (uint16_t)(sign | (size - 0x38000000) >> 13);
}
inline F load_bf16(const uint16_t* p) { return lanes<F>([&](int i) { return float_of((uint32_t)p[i] << 16); }); }
inline F load_f16(const uint16_t* p) { return lanes<F>([&](int i) { return half_to_float(p[i]); }); }
inline void store_f16(uint16_t* p, F x) { for (int i = 0; i < 16; i++) p[i] = float_to_half(x.v[i]); }
inline void store_bf16(uint16_t* p, F x) {  // to nearest, ties to even; a NaN stays one
  for (int i = 0; i < 16; i++) {
    uint32_t bits = bits_of(x.v[i]);
    p[i] = x.v[i] == x.v[i] ? (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : (uint16_t)0x7fc0;
  }
}

inline void load_bf16_pairs(const uint16_t* p, F& even, F& odd) {
  even = lanes<F>([&](int i) { return float_of((uint32_t)p[2 * i] << 16); });
  odd = lanes<F>([&](int i) { return float_of((uint32_t)p[2 * i + 1] << 16); });
}
inline F row_sums(const F* x) {
  alignas(64) float sums[16];
  for (int i = 0; i < 16; i++) sums[i] = sum(x[i]);
  return load(sums);
}
// sums [m][n] += line m of x times the line at weight(n), in quads of lanes, which the compiler keeps in registers.
template <int M, int N, class At> inline void fma_lines(F (&sums)[M][N], const float* x, const At& weight) {
  typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));
#pragma GCC unroll 4
  for (int quad = 0; quad < 4; quad++) {
    Quad lines[N];
    for (int n = 0; n < N; n++) lines[n] = *(const Quad*)(weight(n) + quad * 4);
    for (int m = 0; m < M; m++) {
      const Quad row = *(const Quad*)(x + m * 16 + quad * 4);
      for (int n = 0; n < N; n++) *(Quad*)(sums[m][n].v + quad * 4) += lines[n] * row;
    }
  }
}

template <int N> inline void lane_sums(const F* x, bool first, float* to) {
  for (int i = 0; i < N; i++) to[i] = first ? sum(x[i]) : to[i] + sum(x[i]);
}
inline void transpose16(const uint32_t* from, int64_t stride, uint32_t* to) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) to[j * 16 + i] = from[i * stride + j];
}

inline Bytes load_bytes(const uint8_t* p) { Bytes r; memcpy(r.v, p, 64); return r; }
inline void store_bytes(uint8_t* p, Bytes x) { memcpy(p, x.v, 64); }
inline Bytes repeat4(const int8_t* p) {
  Bytes r;
  for (int i = 0; i < 16; i++) memcpy(r.v + 4 * i, p, 4);
  return r;
}
inline I add_bytes(I acc, Bytes x) {  // the bytes as 16 words, which wrap around
  for (int i = 0; i < 16; i++) {
    uint32_t word;
    memcpy(&word, x.v + 4 * i, 4);
    acc.v[i] = (int32_t)((uint32_t)acc.v[i] + word);
  }
  return acc;
}
inline Bytes low_nibbles(Bytes x) { for (uint8_t& b : x.v) b &= 15; return x; }
inline Bytes low_high_nibbles(Bytes x) { for (uint8_t& b : x.v) b >>= 4; return x; }
inline Bytes high_nibbles(Bytes x) { return low_high_nibbles(x); }

inline void dot_bytes(I& acc, Bytes w, Bytes x) {
  for (int i = 0; i < 16; i++)
    for (int b = 0; b < 4; b++) acc.v[i] += (int32_t)w.v[4 * i + b] * (int8_t)x.v[4 * i + b];
}
inline void dot_nibbles(I& acc, Bytes w, Bytes x) { dot_bytes(acc, w, x); }

inline F nibble_less_8(Bytes x, int shift) {
  return lanes<F>([&](int i) { return (float)((x.v[4 * i + shift / 8] >> (shift & 4) & 15) - 8); });
}
inline F byte_less_128(Bytes x, int shift) { return lanes<F>([&](int i) { return (float)(x.v[4 * i + shift / 8] - 128); }); }

}  // namespace
