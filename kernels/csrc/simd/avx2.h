// Sixteen lanes in two AVX2 registers: the names of simd/avx512.h.
#pragma once
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile with -mavx2 -mfma -mf16c"
#endif
#include <immintrin.h>
#include <stdint.h>

// Put before a loop over an array of vectors. Empty here: the compiler unrolls what fits, and more costs compile time.
#define QVL_UNROLL
#define QVL_UNROLL_SUMS _Pragma("GCC unroll 16")  // before one over sums that must stay in registers

namespace {

constexpr int kDotRows = 3, kDotOutputs = 2;  // of a tile of a dense GEMM, whose lanes are inputs
constexpr int kDotStreams = 4;  // rows of a dense weight that one row is multiplied with at once
constexpr int kHeadLines = 8;  // of a cached vector of a head of 128, in decoding
constexpr int kStripRows = 6, kStripVectors = 1;  // of attention: 6 accumulators of two registers each
constexpr int kSumOrder[16] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};  // of `sum`: leaves of a binary tree
constexpr int kOneRowStreams = 4;  // blocks that one row is multiplied with at once
constexpr int kFewSums = 8;        // few rows times blocks
constexpr int kTileRows = 12, kTileBlocks = 1;  // of a GEMM tile: for one half of the outputs after the other
// vpmaddubsw saturates at 16 bits, so that high nibbles must be shifted down first.
constexpr int kHighNibbleShift = 0;
#define QVL_OWN_DOTS "linear/dots_avx2.inl"  // see linear/dots.inl

struct F { __m256 a, b; };
struct I { __m256i a, b; };
using Bytes = I;

inline F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
inline F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F reciprocal(F x) { return div(set1(1.0f), x); }
inline F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
// acc[0] += x * w[0]. In assembly so that x is loaded next to its products: g++ 12 moves the loads of all rows of a tile to
// the front, and sums to memory.
inline void fma_broadcast(F (&acc)[1], const float* x, const F (&w)[1]) {
  __m256 wide;
  asm("vbroadcastss %3, %2\n\tvfmadd231ps %4, %2, %0\n\tvfmadd231ps %5, %2, %1"
      : "+x"(acc[0].a), "+x"(acc[0].b), "=&x"(wide) : "m"(*x), "x"(w[0].a), "x"(w[0].b));
}
inline F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F abs(F x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline F copysign(F size, F from) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(sign, size.a), _mm256_and_ps(sign, from.a)),
          _mm256_or_ps(_mm256_andnot_ps(sign, size.b), _mm256_and_ps(sign, from.b))};
}
inline float sum(F x) {
  __m256 half = _mm256_add_ps(x.a, x.b);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
inline float highest(F x) {
  __m256 half = _mm256_max_ps(x.a, x.b);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}

inline I iset1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I iadd(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I isub(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline I shift_digit(I x) { return {_mm256_srai_epi32(x.a, 7), _mm256_srai_epi32(x.b, 7)}; }
inline I imul(I x, I y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
inline int32_t isum(I x) {
  __m256i half = _mm256_add_epi32(x.a, x.b);
  __m128i q = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  q = _mm_add_epi32(q, _mm_shuffle_epi32(q, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(q, _mm_shuffle_epi32(q, 0xb1)));
}
inline I shift_high(I x) { return x; }
inline I nearest(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline F power_of_two(I x) {
  const __m256i bias = _mm256_set1_epi32(127);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(x.a, bias), 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(x.b, bias), 23))};
}
inline __m128i half_line(const void* p) { return _mm_loadl_epi64((const __m128i*)p); }
inline I load_u8(const uint8_t* p) { return {_mm256_cvtepu8_epi32(half_line(p)), _mm256_cvtepu8_epi32(half_line(p + 8))}; }
inline I load_i8(const int8_t* p) { return {_mm256_cvtepi8_epi32(half_line(p)), _mm256_cvtepi8_epi32(half_line(p + 8))}; }
inline __m256i join16(__m256i a, __m256i b) { return _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8); }
inline void store_i8(int8_t* p, I x) {
  __m256i words = join16(x.a, x.b);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

inline __m256 widen_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline F load_bf16(const uint16_t* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
inline F load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline void store_f16(uint16_t* p, F x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
inline __m256i round_bf16(__m256 x) {  // to nearest, ties to even; a NaN stays one
  __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), nan), 16);
}
inline void store_bf16(uint16_t* p, F x) {
  __m256i words = _mm256_packus_epi32(round_bf16(x.a), round_bf16(x.b));
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(words, 0xd8));
}

inline void load_bf16_pairs(const uint16_t* p, F& even, F& odd) {
  const __m256i a = _mm256_loadu_si256((const __m256i*)p), b = _mm256_loadu_si256((const __m256i*)(p + 16));
  const __m256i high = _mm256_set1_epi32((int32_t)0xffff0000);
  even = {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
  odd = {_mm256_castsi256_ps(_mm256_and_si256(a, high)), _mm256_castsi256_ps(_mm256_and_si256(b, high))};
}
// Sums of eight registers pairs, one in each lane, in the order of `sum`.
inline __m256 eight_sums(const F* x) {
  __m256 halves[4], quarters[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m256 one = _mm256_add_ps(x[2 * i].a, x[2 * i].b), other = _mm256_add_ps(x[2 * i + 1].a, x[2 * i + 1].b);
    halves[i] = _mm256_add_ps(_mm256_permute2f128_ps(one, other, 0x20), _mm256_permute2f128_ps(one, other, 0x31));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    const __m256d one = _mm256_castps_pd(halves[2 * i]), other = _mm256_castps_pd(halves[2 * i + 1]);
    quarters[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(one, other)), _mm256_castpd_ps(_mm256_unpackhi_pd(one, other)));
  }
  const __m256 sums = _mm256_add_ps(_mm256_shuffle_ps(quarters[0], quarters[1], 0x88), _mm256_shuffle_ps(quarters[0], quarters[1], 0xdd));
  return _mm256_permutevar8x32_ps(sums, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
inline F row_sums(const F* x) {
  return {eight_sums(x), eight_sums(x + 8)};
}
// sums [m][n] += line m of x times the line at weight(n). One half of the lanes after the other: both do not fit 16 registers.
template <int M, int N, class At> inline void fma_lines(F (&sums)[M][N], const float* x, const At& weight) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++) {
    __m256 lines[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) lines[n] = _mm256_loadu_ps(weight(n) + half * 8);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const __m256 row = _mm256_loadu_ps(x + m * 16 + half * 8);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) {
        __m256& sum = half ? sums[m][n].b : sums[m][n].a;
        sum = _mm256_fmadd_ps(lines[n], row, sum);
      }
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

inline Bytes load_bytes(const uint8_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
inline void store_bytes(uint8_t* p, Bytes x) {
  _mm256_storeu_si256((__m256i*)p, x.a), _mm256_storeu_si256((__m256i*)(p + 32), x.b);
}
inline I add_bytes(I acc, Bytes x) { return iadd(acc, x); }
inline Bytes low_nibbles(Bytes x) {
  const __m256i mask = _mm256_set1_epi8(0x0f);
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
inline Bytes low_high_nibbles(Bytes x) { return low_nibbles({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}); }

inline F field_less(Bytes x, int shift, int mask, int less) {
  const __m128i count = _mm_cvtsi32_si128(shift);
  const __m256i m = _mm256_set1_epi32(mask), l = _mm256_set1_epi32(less);
  return {_mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_and_si256(_mm256_srl_epi32(x.a, count), m), l)),
          _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_and_si256(_mm256_srl_epi32(x.b, count), m), l))};
}
inline F nibble_less_8(Bytes x, int shift) { return field_less(x, shift, 15, 8); }
inline F byte_less_128(Bytes x, int shift) { return field_less(x, shift, 255, 128); }

}  // namespace
