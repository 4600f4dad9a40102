// Sixteen lanes in one AVX-512 register. The same names exist for AVX2 and for any machine; kernels use nothing else.
#pragma once
#if !defined(__AVX512VNNI__) || !defined(__AVX512BW__) || !defined(__AVX512VL__)
#error "compile with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma -mf16c"
#endif
#include <immintrin.h>
#include <stdint.h>

#include "threads.h"

// Put before a loop over an array of vectors: unrolled, it keeps them in registers.
#define QVL_UNROLL _Pragma("GCC unroll 16")
#define QVL_UNROLL_SUMS _Pragma("GCC unroll 24")  // before one over all sums of a tile, of more vectors than one has lanes

namespace {

constexpr int kDotRows = 6, kDotOutputs = 4;  // of a tile of a dense GEMM, whose lanes are inputs
constexpr int kDotStreams = 8;  // rows of a dense weight that one row is multiplied with at once
constexpr int kHeadLines = 8;  // of a cached vector of a head of 128, in decoding
constexpr int kStripRows = 12, kStripVectors = 2;  // of attention: 12 x 2 accumulators
constexpr int kSumOrder[16] = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};  // of `sum`: leaves of a binary tree
constexpr int kOneRowStreams = 8;  // blocks that one row is multiplied with at once: 24 accumulators
constexpr int kFewSums = 8;        // few rows times blocks, three accumulators each
constexpr int kTileRows = 12, kTileBlocks = 2;  // of a GEMM tile: 24 accumulators, 2 weights, an activation in 32 registers
// A high nibble is multiplied in place, 16 times too large; the sum of a group is shifted once instead.
constexpr int kHighNibbleShift = 4;

using F = __m512;      // 16 floats
using I = __m512i;     // 16 int32
using Bytes = __m512i; // 64 bytes, four to a lane

inline F zero() { return _mm512_setzero_ps(); }
inline F set1(float x) { return _mm512_set1_ps(x); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F a) { _mm512_storeu_ps(p, a); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
// 1 / a to 23 bits: a 14-bit estimate and one Newton step, in a third of the time of a division.
inline F reciprocal(F a) {
  const F r = _mm512_rcp14_ps(a);
  return _mm512_fmadd_ps(r, _mm512_fnmadd_ps(a, r, _mm512_set1_ps(1.0f)), r);
}
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
// acc[n] += x * w[n]. In assembly so that x is loaded next to its products: g++ 12 moves the loads of all rows of a tile to
// the front, and sums to memory.
inline void fma_broadcast(F (&acc)[2], const float* x, const F (&w)[2]) {
  F wide;
  asm("vbroadcastss %3, %2\n\tvfmadd231ps %4, %2, %0\n\tvfmadd231ps %5, %2, %1"
      : "+v"(acc[0]), "+v"(acc[1]), "=&v"(wide) : "m"(*x), "v"(w[0]), "v"(w[1]));
}
inline void fma_broadcast(F (&acc)[1], const float* x, const F (&w)[1]) {
  asm("vfmadd231ps %1%{1to16%}, %2, %0" : "+v"(acc[0]) : "m"(*x), "v"(w[0]));
}
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F abs(F a) { return _mm512_abs_ps(a); }
inline float sum(F a) { return _mm512_reduce_add_ps(a); }
inline float highest(F a) { return _mm512_reduce_max_ps(a); }
inline F copysign(F size, F sign) {
  const __m512i bit = _mm512_set1_epi32(INT32_MIN);
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(bit, _mm512_castps_si512(sign), _mm512_castps_si512(size), 0xca));
}

inline I iset1(int32_t x) { return _mm512_set1_epi32(x); }
inline I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
inline I isub(I a, I b) { return _mm512_sub_epi32(a, b); }
inline I imul(I a, I b) { return _mm512_mullo_epi32(a, b); }
inline int32_t isum(I a) { return _mm512_reduce_add_epi32(a); }
inline I shift_high(I a) { return _mm512_srai_epi32(a, kHighNibbleShift); }
inline I nearest(F a) { return _mm512_cvtps_epi32(a); }
inline I shift_digit(I a) { return _mm512_srai_epi32(a, 7); }
inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }
inline F power_of_two(I a) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(a, _mm512_set1_epi32(127)), 23)); }
inline I load_u8(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline I load_i8(const int8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline void store_i8(int8_t* p, I a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a)); }

inline F load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline F load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline void store_f16(uint16_t* p, F a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }
#if defined(__AVX512BF16__)
inline void store_bf16(uint16_t* p, F a) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(a)); }
#else
inline void store_bf16(uint16_t* p, F a) {  // to nearest, ties to even; a NaN stays one
  __m512i bits = _mm512_castps_si512(a);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  up = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}
#endif

// Products of bfloat16 pairs. In assembly, so that code for any AVX-512 machine may hold them and ask for them first; and
// since g++ 12 copies the sums of a tile otherwise. On a Zen 4 vdpbf16ps does twice the work of float multiply-adds in the
// same time, on Intel's half of it (83 against 160 Gop/s of a Xeon's thread).
#define QVL_BF16_PAIRS
inline bool has_bf16_pairs() {
  static const bool has = __builtin_cpu_supports("avx512bf16"), slow = __builtin_cpu_is("intel");
  const int64_t chosen = qvl_bf16_pairs();
  return has && (chosen < 0 ? !slow : chosen > 0);
}
inline void dot_pairs(F& acc, F w, F x) { asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x)); }

// 32 bfloat16 as their even and their odd elements: two cheap moves, where widening them in order takes four.
inline void load_bf16_pairs(const uint16_t* p, F& even, F& odd) {
  const __m512i both = _mm512_loadu_si512(p);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int32_t)0xffff0000)));
}

inline F interleaved_sum(F a, F b) { return add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
inline F pairwise_sum(F a, F b) {
  const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
  return add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}
inline F half_sum(F a, F b) { return add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee)); }
inline F quarter_sum(F a, F b) { return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)); }
// The sums of 16 registers, one in each lane: 15 additions instead of 64 one at a time. In the order of `lane_sums`.
inline F row_sums(const F* x) {
  F fours[4];
QVL_UNROLL
  for (int i = 0; i < 4; i++)
    fours[i] = pairwise_sum(interleaved_sum(x[4 * i], x[4 * i + 1]), interleaved_sum(x[4 * i + 2], x[4 * i + 3]));
  return quarter_sum(half_sum(fours[0], fours[1]), half_sum(fours[2], fours[3]));
}

// sums [m][n] += line m of x times the line at weight(n).
template <int M, int N, class At> inline void fma_lines(F (&sums)[M][N], const float* x, const At& weight) {
  F lines[N];
QVL_UNROLL
  for (int n = 0; n < N; n++) lines[n] = load(weight(n));
QVL_UNROLL
  for (int m = 0; m < M; m++) {
    const F row = load(x + m * 16);
QVL_UNROLL
    for (int n = 0; n < N; n++) sums[m][n] = fma(lines[n], row, sums[m][n]);
  }
}
template <int M, int N, class At> inline void dot_pair_lines(F (&sums)[M][N], const float* x, const At& weight) {
  F lines[N];
QVL_UNROLL
  for (int n = 0; n < N; n++) lines[n] = load(weight(n));
QVL_UNROLL
  for (int m = 0; m < M; m++) {
    const F row = load(x + m * 16);
QVL_UNROLL
    for (int n = 0; n < N; n++) dot_pairs(sums[m][n], lines[n], row);
  }
}

// to [N] = the lanes of N registers, a multiple of four, each added up in the same order; or to += them.
template <int N> inline void lane_sums(const F* x, bool first, float* to) {
  if constexpr (N > 4) lane_sums<N - 4>(x + 4, first, to + 4);
  const F fours = pairwise_sum(interleaved_sum(x[0], x[1]), interleaved_sum(x[2], x[3]));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(fours), _mm512_extractf32x8_ps(fours, 1));
  const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  _mm_storeu_ps(to, first ? sums : _mm_add_ps(_mm_loadu_ps(to), sums));
}

// Transposes 16 x 16 words, from rows `stride` words apart to contiguous columns.
inline void transpose16(const uint32_t* from, int64_t stride, uint32_t* to) {
  I a[16], b[16];
QVL_UNROLL
  for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from + i * stride);
QVL_UNROLL
  for (int i = 0; i < 16; i += 2) b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
QVL_UNROLL
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
QVL_UNROLL
  for (int j = 0; j < 4; j++) {
    const I low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), high = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
    const I low2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88), high2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
    _mm512_storeu_si512(to + j * 16, _mm512_shuffle_i32x4(low, low2, 0x88));
    _mm512_storeu_si512(to + (j + 8) * 16, _mm512_shuffle_i32x4(low, low2, 0xdd));
    _mm512_storeu_si512(to + (j + 4) * 16, _mm512_shuffle_i32x4(high, high2, 0x88));
    _mm512_storeu_si512(to + (j + 12) * 16, _mm512_shuffle_i32x4(high, high2, 0xdd));
  }
}

inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline void store_bytes(uint8_t* p, Bytes a) { _mm512_storeu_si512(p, a); }
inline Bytes repeat4(const int8_t* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}
inline I add_bytes(I acc, Bytes x) { return _mm512_add_epi32(acc, x); }
inline Bytes low_nibbles(Bytes a) { return _mm512_and_si512(a, _mm512_set1_epi8(0x0f)); }
inline Bytes high_nibbles(Bytes a) { return _mm512_and_si512(a, _mm512_set1_epi8((char)0xf0)); }
inline Bytes low_high_nibbles(Bytes a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(0x0f)); }

// acc += four products of unsigned w and signed x in each lane. In assembly since g++ 12 copies and spills the
// accumulators of a GEMM tile otherwise, which halves its speed (350 against 750 Gop/s on two Zen 4 cores).
inline void dot_bytes(I& acc, Bytes w, Bytes x) { asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x)); }
inline void dot_nibbles(I& acc, Bytes w, Bytes x) { dot_bytes(acc, w, x); }

// The nibble at bit `shift` of each lane, less 8. A permutation looks at the lowest four bits only: no mask needed.
inline F nibble_less_8(Bytes a, int shift) {
  const F table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  return _mm512_permutexvar_ps(_mm512_srli_epi32(a, shift), table);
}
// The byte at bit `shift` of each lane, less 128.
inline F byte_less_128(Bytes a, int shift) {
  __m512i byte = _mm512_and_si512(_mm512_srli_epi32(a, shift), _mm512_set1_epi32(0xff));
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(byte, _mm512_set1_epi32(128)));
}
// Pairs of bfloat16: the nibbles at bit `shift` of each half of a lane, less 8; the bytes at `shift` and above, less 128.
// Both are small whole numbers: the lower halves of the floats are zero.
inline F nibble_pairs_less_8(Bytes a, int shift) {
  alignas(64) static const uint16_t kLevels[32] = {  // -8 to 7, twice: bit 4 is the next nibble's and must not count
      0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
      0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040,
      0x4080, 0x40a0, 0x40c0, 0x40e0};
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_srli_epi16(a, (unsigned)shift), _mm512_load_si512(kLevels)));
}
inline F byte_pairs_less_128(Bytes a, int shift) {
  const __m512i even = _mm512_castps_si512(byte_less_128(a, shift)), odd = _mm512_castps_si512(byte_less_128(a, shift + 8));
  return _mm512_castsi512_ps(_mm512_or_si512(_mm512_srli_epi32(even, 16), odd));
}

}  // namespace
