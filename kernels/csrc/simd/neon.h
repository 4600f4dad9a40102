// Sixteen lanes in four NEON registers: the names of simd/avx512.h. Compiled for any 64-bit ARM, for one with dot products
// of int8, and for one with products of int8 matrices and of bfloat16 pairs.
#pragma once
#if !defined(__aarch64__)
#error "for 64-bit ARM"
#endif
#include <arm_neon.h>
#include <stdint.h>

#include "threads.h"

// Put before a loop over an array of vectors: unrolled, it keeps them in registers.
#define QVL_UNROLL _Pragma("GCC unroll 16")
#define QVL_UNROLL_SUMS _Pragma("GCC unroll 24")  // before one over sums that must stay in registers

namespace {

constexpr int kDotRows = 3, kDotOutputs = 2;  // of a tile of a dense GEMM: 24 of the 32 registers
constexpr int kDotStreams = 4;  // rows of a dense weight that one row is multiplied with at once
constexpr int kHeadLines = 8;  // of a cached vector of a head of 128, in decoding
constexpr int kStripRows = 3, kStripVectors = 2;  // of attention: 3 x 2 accumulators of four registers each
constexpr int kSumOrder[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};  // of `sum`: leaves of a binary tree
constexpr int kOneRowStreams = 4;  // blocks that one row is multiplied with at once: 16 accumulators
constexpr int kFewSums = 6;        // few rows times blocks, four accumulators each
constexpr int kTileRows = 12, kTileBlocks = 1;  // of a GEMM tile, some quads of outputs after the others
constexpr int kHighNibbleShift = 0;
#define QVL_OWN_DOTS "linear/dots_neon.inl"  // see linear/dots.inl

struct F { float32x4_t v[4]; };
struct I { int32x4_t v[4]; };
struct Bytes { uint8x16_t v[4]; };

// Each quad of a result: NEON has no wider registers.
template <class R, class Op> inline R quads(Op op) {
  R r;
QVL_UNROLL
  for (int i = 0; i < 4; i++) r.v[i] = op(i);
  return r;
}

inline F set1(float x) { return quads<F>([=](int) { return vdupq_n_f32(x); }); }
inline F zero() { return set1(0.0f); }
inline F load(const float* p) { return quads<F>([=](int i) { return vld1q_f32(p + 4 * i); }); }
inline void store(float* p, F x) {
QVL_UNROLL
  for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, x.v[i]);
}
inline F add(F x, F y) { return quads<F>([&](int i) { return vaddq_f32(x.v[i], y.v[i]); }); }
inline F sub(F x, F y) { return quads<F>([&](int i) { return vsubq_f32(x.v[i], y.v[i]); }); }
inline F mul(F x, F y) { return quads<F>([&](int i) { return vmulq_f32(x.v[i], y.v[i]); }); }
inline F div(F x, F y) { return quads<F>([&](int i) { return vdivq_f32(x.v[i], y.v[i]); }); }
inline F reciprocal(F x) { return div(set1(1.0f), x); }
inline F fma(F x, F y, F z) { return quads<F>([&](int i) { return vfmaq_f32(z.v[i], x.v[i], y.v[i]); }); }
// The second argument if one is NaN, as on x86: FMAX would return NaN for either.
inline F max(F x, F y) { return quads<F>([&](int i) { return vbslq_f32(vcgtq_f32(x.v[i], y.v[i]), x.v[i], y.v[i]); }); }
inline F min(F x, F y) { return quads<F>([&](int i) { return vbslq_f32(vcltq_f32(x.v[i], y.v[i]), x.v[i], y.v[i]); }); }
inline F abs(F x) { return quads<F>([&](int i) { return vabsq_f32(x.v[i]); }); }
inline F copysign(F size, F from) {
  return quads<F>([&](int i) { return vbslq_f32(vdupq_n_u32(0x80000000u), from.v[i], size.v[i]); });
}
// All sums of lanes are in one order: quads, then pairs.
inline float32x4_t quad_sum(F x) { return vaddq_f32(vaddq_f32(x.v[0], x.v[1]), vaddq_f32(x.v[2], x.v[3])); }
inline float sum(F x) { return vaddvq_f32(quad_sum(x)); }
inline float32x4_t four_sums(const F* x) {
  return vpaddq_f32(vpaddq_f32(quad_sum(x[0]), quad_sum(x[1])), vpaddq_f32(quad_sum(x[2]), quad_sum(x[3])));
}
inline float highest(F x) {
  return vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(x.v[0], x.v[1]), vmaxnmq_f32(x.v[2], x.v[3])));
}

inline I iset1(int32_t x) { return quads<I>([=](int) { return vdupq_n_s32(x); }); }
inline I iadd(I x, I y) { return quads<I>([&](int i) { return vaddq_s32(x.v[i], y.v[i]); }); }
inline I isub(I x, I y) { return quads<I>([&](int i) { return vsubq_s32(x.v[i], y.v[i]); }); }
inline I imul(I x, I y) { return quads<I>([&](int i) { return vmulq_s32(x.v[i], y.v[i]); }); }
inline I shift_digit(I x) { return quads<I>([&](int i) { return vshrq_n_s32(x.v[i], 7); }); }
inline I shift_high(I x) { return x; }
inline int32_t isum(I x) { return vaddvq_s32(vaddq_s32(vaddq_s32(x.v[0], x.v[1]), vaddq_s32(x.v[2], x.v[3]))); }
inline I nearest(F x) { return quads<I>([&](int i) { return vcvtnq_s32_f32(x.v[i]); }); }
inline F to_float(I x) { return quads<F>([&](int i) { return vcvtq_f32_s32(x.v[i]); }); }
inline F power_of_two(I x) {
  return quads<F>([&](int i) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(x.v[i], vdupq_n_s32(127)), 23)); });
}
inline I load_i8(const int8_t* p) {
  const int8x16_t bytes = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
  return {{vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)}};
}
inline I load_u8(const uint8_t* p) {
  const uint8x16_t bytes = vld1q_u8(p);
  const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_high_u8(bytes);
  return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))), vreinterpretq_s32_u32(vmovl_high_u16(low)),
           vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))), vreinterpretq_s32_u32(vmovl_high_u16(high))}};
}
inline void store_i8(int8_t* p, I x) {
  const int16x8_t low = vmovn_high_s32(vmovn_s32(x.v[0]), x.v[1]), high = vmovn_high_s32(vmovn_s32(x.v[2]), x.v[3]);
  vst1q_s8(p, vmovn_high_s16(vmovn_s16(low), high));
}

inline F load_bf16(const uint16_t* p) {
  return quads<F>([=](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
}
inline F load_f16(const uint16_t* p) {
  return quads<F>([=](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}
inline void store_f16(uint16_t* p, F x) {
QVL_UNROLL
  for (int i = 0; i < 4; i++) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(x.v[i])));
}
#if defined(__ARM_FEATURE_BF16)
inline uint16x4_t round_bf16(float32x4_t x) { return vreinterpret_u16_bf16(vcvt_bf16_f32(x)); }
#else
inline uint16x4_t round_bf16(float32x4_t x) {  // to nearest, ties to even; a NaN stays one
  const uint32x4_t bits = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), up, vdupq_n_u32(0x7fc00000)), 16);
}
#endif
inline void store_bf16(uint16_t* p, F x) {
QVL_UNROLL
  for (int i = 0; i < 4; i++) vst1_u16(p + 4 * i, round_bf16(x.v[i]));
}
inline void load_bf16_pairs(const uint16_t* p, F& even, F& odd) {
QVL_UNROLL
  for (int i = 0; i < 4; i++) {
    const uint32x4_t both = vreinterpretq_u32_u16(vld1q_u16(p + 8 * i));
    even.v[i] = vreinterpretq_f32_u32(vshlq_n_u32(both, 16));
    odd.v[i] = vreinterpretq_f32_u32(vandq_u32(both, vdupq_n_u32(0xffff0000u)));
  }
}

inline F row_sums(const F* x) { return quads<F>([=](int i) { return four_sums(x + 4 * i); }); }
template <int N> inline void lane_sums(const F* x, bool first, float* to) {
  for (int i = 0; i < N; i++) to[i] = first ? sum(x[i]) : to[i] + sum(x[i]);
}

// sums [m][n] += `multiply` of line m of x and the line at weight(n), a quad of all lines after the other.
template <int M, int N, class At, class Multiply>
inline void each_quad(F (&sums)[M][N], const float* x, const At& weight, const Multiply& multiply) {
QVL_UNROLL
  for (int i = 0; i < 4; i++) {
    float32x4_t lines[N];
QVL_UNROLL
    for (int n = 0; n < N; n++) lines[n] = vld1q_f32(weight(n) + 4 * i);
QVL_UNROLL
    for (int m = 0; m < M; m++) {
      const float32x4_t row = vld1q_f32(x + m * 16 + 4 * i);
QVL_UNROLL
      for (int n = 0; n < N; n++) sums[m][n].v[i] = multiply(sums[m][n].v[i], lines[n], row);
    }
  }
}
template <int M, int N, class At> inline void fma_lines(F (&sums)[M][N], const float* x, const At& weight) {
  each_quad(sums, x, weight, [](float32x4_t sum, float32x4_t line, float32x4_t row) { return vfmaq_f32(sum, line, row); });
}
// acc[n] += x * w[n].
template <int N> inline void fma_broadcast(F (&acc)[N], const float* x, const F (&w)[N]) {
  const float32x4_t wide = vld1q_dup_f32(x);
QVL_UNROLL
  for (int n = 0; n < N; n++) acc[n] = quads<F>([&](int i) { return vfmaq_f32(acc[n].v[i], w[n].v[i], wide); });
}

// Products of bfloat16 pairs: twice the work of float multiply-adds in one instruction, and half of the memory.
#if defined(__ARM_FEATURE_BF16)
#define QVL_BF16_PAIRS
inline bool has_bf16_pairs() { return qvl_bf16_pairs() != 0; }
template <int M, int N, class At> inline void dot_pair_lines(F (&sums)[M][N], const float* x, const At& weight) {
  each_quad(sums, x, weight, [](float32x4_t sum, float32x4_t line, float32x4_t row) {
    return vbfdotq_f32(sum, vreinterpretq_bf16_f32(line), vreinterpretq_bf16_f32(row));
  });
}
#endif

// Transposes 16 x 16 words, from rows `stride` words apart to contiguous columns.
inline void transpose16(const uint32_t* from, int64_t stride, uint32_t* to) {
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 16; j += 4) {
      const uint32_t* part = from + i * stride + j;
      const uint32x4_t a = vld1q_u32(part), b = vld1q_u32(part + stride);
      const uint32x4_t c = vld1q_u32(part + 2 * stride), d = vld1q_u32(part + 3 * stride);
      const uint64x2_t ab = vreinterpretq_u64_u32(vtrn1q_u32(a, b)), cd = vreinterpretq_u64_u32(vtrn1q_u32(c, d));
      const uint64x2_t ab2 = vreinterpretq_u64_u32(vtrn2q_u32(a, b)), cd2 = vreinterpretq_u64_u32(vtrn2q_u32(c, d));
      uint32_t* turned = to + j * 16 + i;
      vst1q_u32(turned, vreinterpretq_u32_u64(vtrn1q_u64(ab, cd)));
      vst1q_u32(turned + 16, vreinterpretq_u32_u64(vtrn1q_u64(ab2, cd2)));
      vst1q_u32(turned + 32, vreinterpretq_u32_u64(vtrn2q_u64(ab, cd)));
      vst1q_u32(turned + 48, vreinterpretq_u32_u64(vtrn2q_u64(ab2, cd2)));
    }
}

inline Bytes load_bytes(const uint8_t* p) { return quads<Bytes>([=](int i) { return vld1q_u8(p + 16 * i); }); }
inline void store_bytes(uint8_t* p, Bytes x) {
QVL_UNROLL
  for (int i = 0; i < 4; i++) vst1q_u8(p + 16 * i, x.v[i]);
}
inline I add_bytes(I acc, Bytes x) {
  return quads<I>([&](int i) { return vaddq_s32(acc.v[i], vreinterpretq_s32_u8(x.v[i])); });
}

inline F field_less(Bytes x, int shift, int32_t mask, int32_t less) {
  return quads<F>([&](int i) {
    const uint32x4_t down = vshlq_u32(vreinterpretq_u32_u8(x.v[i]), vdupq_n_s32(-shift));
    const int32x4_t field = vandq_s32(vreinterpretq_s32_u32(down), vdupq_n_s32(mask));
    return vcvtq_f32_s32(vsubq_s32(field, vdupq_n_s32(less)));
  });
}
inline F nibble_less_8(Bytes x, int shift) { return field_less(x, shift, 15, 8); }
inline F byte_less_128(Bytes x, int shift) { return field_less(x, shift, 255, 128); }

}  // namespace
