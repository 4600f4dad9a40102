// Products of packed weights and int8 activations, added up as integers: the innermost loops of linear/int8.inl. Where
// simd/avx2.h or simd/neon.h is used (QVL_OWN_DOTS), dots_avx2.inl or dots_neon.inl has others.
//
// x: words of four inputs of M rows, [..][M], as linear/quantize.inl writes them. Weights: NB blocks, `stride` bytes apart.
namespace {

constexpr int64_t kLinesAhead = 1024;  // prefetch distance in a block that is in a cache, bytes

// Prefetches what one of STREAMS streams of memory reads next. Twice: a prefetch to the L1 cache holds one of its few buffers
// until memory answers, one to the L2 cache does not, and the other then waits for that cache only.
template <int STREAMS> inline void prefetch_ahead(const uint8_t* at) {
  __builtin_prefetch(at + 4096 / STREAMS);
  __builtin_prefetch(at + 8192 / STREAMS, 0, 2);
}

}  // namespace

#if !defined(QVL_OWN_DOTS)
namespace {

constexpr bool kBytesLess128 = false;  // whether products of bytes are those of the bytes less 128

// Lines of nibbles: low and high [M][NB] += their products; those in `high` are 2^kHighNibbleShift times too large.
template <int M, int NB>
inline void nibble_lines(I (&low)[M][NB], I (&high)[M][NB], const uint8_t* at, int64_t stride, const int8_t* x, int64_t lines, bool ahead) {
#pragma GCC unroll 1
  for (int64_t j = 0; j < lines; j++, at += 64, x += 8 * M) {
QVL_UNROLL
    for (int n = 0; n < NB; n++) {
      const Bytes line = load_bytes(at + n * stride), first = low_nibbles(line), second = high_nibbles(line);
      if (ahead) prefetch_ahead<NB>(at + n * stride);
QVL_UNROLL
      for (int m = 0; m < M; m++) {
        dot_nibbles(low[m][n], first, repeat4(x + 4 * m));
        dot_nibbles(high[m][n], second, repeat4(x + 4 * (M + m)));
      }
    }
  }
}

// Lines of bytes: sums [M][NB] += their products.
template <bool CACHED = false, int M, int NB>
inline void byte_lines(I (&sums)[M][NB], const uint8_t* at, int64_t stride, const int8_t* x, int64_t lines, bool ahead) {
#pragma GCC unroll 1
  for (int64_t j = 0; j < lines; j++, at += 64, x += 4 * M) {
    Bytes line[NB];
QVL_UNROLL
    for (int n = 0; n < NB; n++) {
      line[n] = load_bytes(at + n * stride);
      if (CACHED) __builtin_prefetch(at + n * stride + kLinesAhead);
      else if (ahead) prefetch_ahead<NB>(at + n * stride);
    }
QVL_UNROLL
    for (int m = 0; m < M; m++) {
      const Bytes words = repeat4(x + 4 * m);
QVL_UNROLL
      for (int n = 0; n < NB; n++) dot_bytes(sums[m][n], line[n], words);
    }
  }
}

// The same of lines that are in a cache: bytes, or nibbles unpacked to bytes.
template <bool NIBBLES, int M, int NB>
inline void unpacked_lines(I (&sums)[M][NB], const uint8_t* at, int64_t stride, const int8_t* x, int64_t lines) {
  byte_lines<true>(sums, at, stride, x, lines, true);
}

}  // namespace
#endif
