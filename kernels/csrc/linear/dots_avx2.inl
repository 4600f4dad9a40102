// The names of linear/dots.inl for 16 registers: eight outputs at a time, half of a line, so that up to 12 sums fit.
//
// AVX-VNNI multiplies and adds in one instruction. AVX2 multiplies bytes to sums of two in 16 bits, which take the products
// of 32 inputs with nibbles (15 * 127 * 2 * 8 < 2^15) before they are widened; products of bytes are widened at once.
//
// In assembly, which keeps each broadcast with the products that use it: g++ 12 moves all of them to the front of a tile's
// loop, and the sums to memory.
#include <immintrin.h>

namespace {

inline __m256i half_line(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
typedef int32_t Word __attribute__((aligned(1), may_alias));  // four inputs of a row
inline const Word& word_at(const int8_t* p) { return *(const Word*)p; }
inline __m256i& half_of(I& x, int half) { return half ? x.b : x.a; }
inline __m256i low_half(__m256i x) { return _mm256_and_si256(x, _mm256_set1_epi8(0x0f)); }
inline __m256i high_half(__m256i x) { return low_half(_mm256_srli_epi16(x, 4)); }

#if defined(QVL_AVX_VNNI)
constexpr bool kBytesLess128 = false;
constexpr int kNibbleLines = 1 << 20;  // as many as there are

// acc += four products of unsigned w and signed x in each lane.
inline void dot_half(__m256i& acc, __m256i w, const int8_t* x) {
  __m256i words;
  asm("vpbroadcastd %3, %1\n\t%{vex%} vpdpbusd %1, %2, %0" : "+x"(acc), "=&x"(words) : "x"(w), "m"(word_at(x)));
}
inline void dot_half(__m256i& acc, __m256i w, __m256i words) { asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(w), "x"(words)); }
// The same, and the four inputs for more products with them.
inline __m256i first_dot(__m256i& acc, __m256i w, const int8_t* x) {
  __m256i words;
  asm("vpbroadcastd %3, %1\n\t%{vex%} vpdpbusd %1, %2, %0" : "+x"(acc), "=&x"(words) : "x"(w), "m"(word_at(x)));
  return words;
}
inline __m256i widened(__m256i acc) { return acc; }

struct ByteHalf {
  __m256i bytes;
  explicit ByteHalf(const uint8_t* p) : bytes(half_line(p)) {}
  inline void dot(__m256i& acc, const int8_t* x) const { dot_half(acc, bytes, x); }
};
#else
constexpr bool kBytesLess128 = true;
constexpr int kNibbleLines = 4;  // of packed nibbles, 8 inputs each, whose sums fit 16 bits

inline void dot_half(__m256i& acc, __m256i w, const int8_t* x) {
  __m256i words;
  asm("vpbroadcastd %3, %1\n\tvpmaddubsw %1, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(acc), "=&x"(words) : "x"(w), "m"(word_at(x)));
}
inline void dot_half(__m256i& acc, __m256i w, __m256i words) {
  __m256i products;
  asm("vpmaddubsw %2, %3, %1\n\tvpaddw %1, %0, %0" : "+x"(acc), "=x"(products) : "x"(words), "x"(w));
}
// The same, and the four inputs for more products with them.
inline __m256i first_dot(__m256i& acc, __m256i w, const int8_t* x) {
  __m256i words, products;
  asm("vpbroadcastd %4, %1\n\tvpmaddubsw %1, %3, %2\n\tvpaddw %2, %0, %0"
      : "+x"(acc), "=&x"(words), "=&x"(products) : "x"(w), "m"(word_at(x)));
  return words;
}
inline __m256i widened(__m256i acc) { return _mm256_madd_epi16(acc, _mm256_set1_epi16(1)); }

// Weights less 128: their sizes times activations with their signs, 128 * 127 * 2 at most.
struct ByteHalf {
  __m256i weights, sizes;
  explicit ByteHalf(const uint8_t* p) : weights(_mm256_xor_si256(half_line(p), _mm256_set1_epi8((char)0x80))) {
    sizes = _mm256_abs_epi8(weights);
  }
  inline void dot(__m256i& acc, const int8_t* x) const {
    __m256i words;
    asm("vpbroadcastd %4, %1\n\tvpsignb %2, %1, %1\n\tvpmaddubsw %1, %3, %1\n\tvpmaddwd %5, %1, %1\n\tvpaddd %1, %0, %0"
        : "+x"(acc), "=&x"(words) : "x"(weights), "x"(sizes), "m"(word_at(x)), "x"(_mm256_set1_epi16(1)));
  }
};
#endif

#if !defined(QVL_AVX_VNNI)
// acc = four products of unsigned w and signed x in pairs, or, unless FIRST, added to it.
template <bool FIRST> inline void pair_products(__m256i (&acc)[2], __m256i left, __m256i right, const int8_t* x) {
  __m256i words, products;
  if constexpr (FIRST)
    asm("vpbroadcastd %5, %2\n\tvpmaddubsw %2, %3, %0\n\tvpmaddubsw %2, %4, %1"
        : "=&x"(acc[0]), "=&x"(acc[1]), "=&x"(words) : "x"(left), "x"(right), "m"(word_at(x)));
  else
    asm("vpbroadcastd %6, %2\n\tvpmaddubsw %2, %4, %3\n\tvpaddw %3, %0, %0\n\tvpmaddubsw %2, %5, %2\n\tvpaddw %2, %1, %1"
        : "+x"(acc[0]), "+x"(acc[1]), "=&x"(words), "=&x"(products) : "x"(left), "x"(right), "m"(word_at(x)));
}

inline void add_widened(I& sum, const __m256i (&acc)[2]) { sum = iadd(sum, {widened(acc[0]), widened(acc[1])}); }

// Four lines of a block times the three planes of an exact row. The low planes have digits of -64 to 63, so that the products
// of eight lines fit 16 bits; only the highest starts at zero here unless FIRST.
template <bool FIRST, bool AHEAD> inline void four_lines(__m256i (&acc)[3][2], const uint8_t* line, const int8_t* x) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const __m256i left = half_line(line + j * 64), right = half_line(line + j * 64 + 32);
    if (AHEAD) __builtin_prefetch(line + j * 64 + kLinesAhead);
#pragma GCC unroll 2
    for (int high = 0; high < 2; high++) {
      const __m256i low_or_high[2] = {high ? high_half(left) : low_half(left), high ? high_half(right) : low_half(right)};
      const int8_t* words = x + (j * 2 + high) * 12;
#pragma GCC unroll 3
      for (int m = 0; m < 3; m++) {
        if (j == 0 && high == 0 && (FIRST || m == 2)) pair_products<true>(acc[m], low_or_high[0], low_or_high[1], words + 4 * m);
        else pair_products<false>(acc[m], low_or_high[0], low_or_high[1], words + 4 * m);
      }
    }
  }
}

// The three planes of an exact row, one block after the other.
template <bool AHEAD, int NB>
inline void planes_of_a_row(I (&sums)[3][NB], const uint8_t* at, int64_t stride, const int8_t* x, int64_t lines) {
#pragma GCC unroll 1
  for (int n = 0; n < NB; n++)
#pragma GCC unroll 1
    for (int64_t j = 0; j < lines; j += 8) {
      const uint8_t* line = at + n * stride + j * 64;
      __m256i acc[3][2];
      four_lines<true, AHEAD>(acc, line, x + j * 24);
      add_widened(sums[2][n], acc[2]);
      if (lines - j > 4) {
        four_lines<false, AHEAD>(acc, line + 256, x + (j + 4) * 24);
        add_widened(sums[2][n], acc[2]);
      }
      add_widened(sums[0][n], acc[0]);
      add_widened(sums[1][n], acc[1]);
    }
}

// One row of up to four blocks, which share its inputs.
template <bool AHEAD, int NB>
inline void one_row(I (&sums)[1][NB], const uint8_t* at, int64_t stride, const int8_t* x, int64_t lines) {
#pragma GCC unroll 1
  for (int64_t first = 0; first < lines; first += kNibbleLines, at += 64 * kNibbleLines, x += 8 * kNibbleLines) {
    __m256i acc[NB][2];
#pragma GCC unroll 4
    for (int j = 0; j < kNibbleLines; j++) {
      const __m256i words[2] = {_mm256_set1_epi32(word_at(x + 8 * j)), _mm256_set1_epi32(word_at(x + 8 * j + 4))};
#pragma GCC unroll 4
      for (int n = 0; n < NB; n++) {
        if (AHEAD) __builtin_prefetch(at + n * stride + 64 * j + kLinesAhead);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
          const __m256i both = half_line(at + n * stride + 64 * j + 32 * half);
          if (j == 0) acc[n][half] = _mm256_maddubs_epi16(low_half(both), words[0]);
          else dot_half(acc[n][half], low_half(both), words[0]);
          dot_half(acc[n][half], high_half(both), words[1]);
        }
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < NB; n++) add_widened(sums[0][n], acc[n]);
  }
}
#endif

// Columns are halves of a line of a block: one row takes both halves of four, up to six rows those of one block after the
// other where they have few, and more rows one half after the other.
template <int M, int NB>
inline void nibble_lines(I (&low)[M][NB], I (&)[M][NB], const uint8_t* at, int64_t stride, const int8_t* x, int64_t lines, bool ahead) {
#if !defined(QVL_AVX_VNNI)  // a group has a multiple of four lines; three rows are the planes of one
  if constexpr (M == 3) return ahead ? planes_of_a_row<true>(low, at, stride, x, lines) : planes_of_a_row<false>(low, at, stride, x, lines);
  if constexpr (M == 1) return ahead ? one_row<true>(low, at, stride, x, lines) : one_row<false>(low, at, stride, x, lines);
#endif
  constexpr bool kInTurn = M > 1 && M <= 6 && NB <= 2;  // blocks
  constexpr int kBlocks = kInTurn ? 1 : NB, kHalves = kInTurn || (M == 1 && NB <= 4) ? 2 : 1, kColumns = kBlocks * kHalves;
  for (int64_t first = 0; first < lines; first += kNibbleLines) {
    const int64_t end = lines - first < kNibbleLines ? lines : first + kNibbleLines;
#pragma GCC unroll 2
    for (int part = 0; part < NB / kBlocks * 2 / kHalves; part++) {
      const int block = kInTurn ? part : 0, half = kInTurn ? 0 : part;
      __m256i acc[M][kColumns];
#pragma GCC unroll 16
      for (int i = 0; i < M * kColumns; i++) acc[i / kColumns][i % kColumns] = _mm256_setzero_si256();
#pragma GCC unroll 1
      for (int64_t j = first; j < end; j++) {
        const uint8_t* line = at + block * stride + j * 64 + half * 32;
        const int8_t* words = x + j * 8 * M;
#pragma GCC unroll 8
        for (int n = 0; n < kBlocks; n++)
          if (ahead && !half) __builtin_prefetch(line + n * stride + kLinesAhead);
#pragma GCC unroll 2
        for (int high = 0; high < 2; high++) {
          __m256i levels[kColumns];
#pragma GCC unroll 8
          for (int c = 0; c < kColumns; c++) {
            const __m256i both = half_line(line + c / kHalves * stride + c % kHalves * 32);
            levels[c] = high ? high_half(both) : low_half(both);
          }
#pragma GCC unroll 8
          for (int m = 0; m < M; m++) {
            const __m256i inputs = first_dot(acc[m][0], levels[0], words + 4 * (high * M + m));
#pragma GCC unroll 8
            for (int c = 1; c < kColumns; c++) dot_half(acc[m][c], levels[c], inputs);
          }
        }
      }
#pragma GCC unroll 16
      for (int i = 0; i < M * kColumns; i++) {
        const int m = i / kColumns, c = i % kColumns;
        __m256i& sum = half_of(low[m][block + c / kHalves], half + c % kHalves);
        sum = _mm256_add_epi32(sum, widened(acc[m][c]));
      }
    }
  }
}

template <int M, int NB>
inline void byte_lines(I (&sums)[M][NB], const uint8_t* at, int64_t stride, const int8_t* x, int64_t lines, bool ahead) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++) {
    __m256i acc[M][NB];
#pragma GCC unroll 16
    for (int i = 0; i < M * NB; i++) acc[i / NB][i % NB] = half_of(sums[i / NB][i % NB], half);
#pragma GCC unroll 1
    for (int64_t j = 0; j < lines; j++) {
#pragma GCC unroll 8
      for (int n = 0; n < NB; n++) {
        const ByteHalf weights(at + n * stride + j * 64 + half * 32);
        if (ahead && !half) __builtin_prefetch(at + n * stride + j * 64 + kLinesAhead);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) weights.dot(acc[m][n], x + (j * M + m) * 4);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M * NB; i++) half_of(sums[i / NB][i % NB], half) = acc[i / NB][i % NB];
  }
}

// Lines of a cached block of nibbles, or of bytes with AVX-VNNI: up to six rows at a time with both halves, which share the
// broadcasts. Twelve rows with one half would be a sixth more instructions.
template <int M, int NB>
inline void lines_in_both_halves(I (&sums)[M][NB], const uint8_t* at, int64_t stride, const int8_t* x, int64_t lines) {
  constexpr int kAtOnce = M > 6 ? M / 2 : M;
  static_assert(M % kAtOnce == 0 && kAtOnce <= 6, "sums in twelve registers");
  for (int64_t first = 0; first < lines; first += 2 * kNibbleLines) {
    const int64_t end = lines - first < 2 * kNibbleLines ? lines : first + 2 * kNibbleLines;
    for (int i = 0; i < M / kAtOnce * NB; i++) {
      const int from = i / NB * kAtOnce, n = i % NB;
      __m256i acc[kAtOnce][2];
#pragma GCC unroll 6
      for (int m = 0; m < kAtOnce; m++) acc[m][0] = acc[m][1] = _mm256_setzero_si256();
#pragma GCC unroll 1
      for (int64_t j = first; j < end; j++) {
        const uint8_t* line = at + n * stride + j * 64;
        const __m256i left = half_line(line), right = half_line(line + 32);
#pragma GCC unroll 6
        for (int m = 0; m < kAtOnce; m++) {
          const __m256i inputs = first_dot(acc[m][0], left, x + (j * M + from + m) * 4);
          dot_half(acc[m][1], right, inputs);
        }
      }
#pragma GCC unroll 6
      for (int m = 0; m < kAtOnce; m++) {
        I& sum = sums[from + m][n];
        sum = iadd(sum, {widened(acc[m][0]), widened(acc[m][1])});
      }
    }
  }
}

template <bool NIBBLES, int M, int NB>
inline void unpacked_lines(I (&sums)[M][NB], const uint8_t* at, int64_t stride, const int8_t* x, int64_t lines) {
  if constexpr (NIBBLES || !kBytesLess128) lines_in_both_halves(sums, at, stride, x, lines);
  else byte_lines(sums, at, stride, x, lines, false);
}

}  // namespace
