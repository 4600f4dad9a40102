// The names of linear/dots.inl for NEON, whose 32 registers of four outputs hold up to 24 sums.
//
// SDOT multiplies four outputs with one word of a register of words, so that rows need no broadcasts. SMMLA (I8MM) multiplies
// two rows with two outputs, eight inputs each: twice the products in an instruction. Without either, two products of int8
// fit 16 bits (127 * 128 * 2 < 2^15) before they are widened. All of them are signed: bytes are read less 128.

// Before a loop over sums, products or weights: one that is not unrolled to its end keeps its vectors in memory.
#define QVL_UNROLL_ALL _Pragma("GCC unroll 64")

namespace {

constexpr bool kBytesLess128 = true;

// acc += products of four outputs, four inputs each, with one of the four words in x.
inline void dot_word(int32x4_t& acc, int8x16_t w, int8x16_t x, int word) {
#if defined(__ARM_FEATURE_DOTPROD)
  switch (word) {  // an immediate of the instruction
    case 0: acc = vdotq_laneq_s32(acc, w, x, 0); break;
    case 1: acc = vdotq_laneq_s32(acc, w, x, 1); break;
    case 2: acc = vdotq_laneq_s32(acc, w, x, 2); break;
    default: acc = vdotq_laneq_s32(acc, w, x, 3); break;
  }
#else
  const int32x4_t words = vreinterpretq_s32_s8(x);
  const int32x4_t four = word == 0   ? vdupq_laneq_s32(words, 0)
                         : word == 1 ? vdupq_laneq_s32(words, 1)
                         : word == 2 ? vdupq_laneq_s32(words, 2)
                                     : vdupq_laneq_s32(words, 3);
  const int8x16_t y = vreinterpretq_s8_s32(four);
  acc = vpadalq_s16(acc, vpaddq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(y)), vmull_high_s8(w, y)));
#endif
}

inline int8x16_t low_half(uint8x16_t x) { return vreinterpretq_s8_u8(vandq_u8(x, vdupq_n_u8(15))); }
inline int8x16_t high_half(uint8x16_t x) { return vreinterpretq_s8_u8(vshrq_n_u8(x, 4)); }
inline int8x16_t less_128(uint8x16_t x) { return vreinterpretq_s8_u8(veorq_u8(x, vdupq_n_u8(128))); }

// Quads of outputs whose sums are in registers together.
constexpr int quads_at_once(int sums) { return sums * 4 <= 24 ? 4 : sums * 2 <= 24 ? 2 : 1; }

// sums [M][NB] += products of `lines` lines that PARTS splits into one or two registers of weights each.
template <int PARTS, int M, int NB, class Split>
inline void add_lines(I (&sums)[M][NB], const uint8_t* at, int64_t stride, const int8_t* x, int64_t lines, bool ahead, const Split& split) {
  constexpr int Q = quads_at_once(M * NB), kWords = PARTS * M;  // words of a line
  constexpr int kLines = kWords % 4 == 0 ? 1 : kWords % 2 == 0 ? 2 : 4, kRegisters = kWords * kLines / 4;
QVL_UNROLL_ALL
  for (int quad = 0; quad < 4; quad += Q) {
    int32x4_t acc[M][NB][Q];
QVL_UNROLL_ALL
    for (int i = 0; i < M * NB * Q; i++) acc[i / Q / NB][i / Q % NB][i % Q] = sums[i / Q / NB][i / Q % NB].v[quad + i % Q];
#pragma GCC unroll 1
    for (int64_t j = 0; j < lines; j += kLines) {
      int8x16_t words[kRegisters];
QVL_UNROLL_ALL
      for (int i = 0; i < kRegisters; i++) words[i] = vld1q_s8(x + j * kWords * 4 + i * 16);
QVL_UNROLL_ALL
      for (int i = 0; i < kLines * NB * Q; i++) {
        const int l = i / Q / NB, n = i / Q % NB, q = i % Q;
        const uint8_t* line = at + n * stride + (j + l) * 64;
        if (ahead && quad == 0 && q == 0) __builtin_prefetch(line + kLinesAhead);
        int8x16_t weights[PARTS];
        split(vld1q_u8(line + (quad + q) * 16), weights);
QVL_UNROLL_ALL
        for (int m = 0; m < kWords; m++) {
          const int word = l * kWords + m;
          dot_word(acc[m % M][n][q], weights[m / M], words[word / 4], word % 4);
        }
      }
    }
QVL_UNROLL_ALL
    for (int i = 0; i < M * NB * Q; i++) sums[i / Q / NB][i / Q % NB].v[quad + i % Q] = acc[i / Q / NB][i / Q % NB][i % Q];
  }
}

template <int M, int NB>
inline void nibble_lines(I (&low)[M][NB], I (&)[M][NB], const uint8_t* at, int64_t stride, const int8_t* x, int64_t lines, bool ahead) {
  add_lines<2>(low, at, stride, x, lines, ahead, [](uint8x16_t both, int8x16_t* w) { w[0] = low_half(both), w[1] = high_half(both); });
}
template <int M, int NB>
inline void byte_lines(I (&sums)[M][NB], const uint8_t* at, int64_t stride, const int8_t* x, int64_t lines, bool ahead) {
  add_lines<1>(sums, at, stride, x, lines, ahead, [](uint8x16_t bytes, int8x16_t* w) { w[0] = less_128(bytes); });
}

// Panels for many rows hold signed bytes: as in 8-bit lines, or, for SMMLA, eight inputs of an output after those of another.
#define QVL_OWN_PANELS
inline void put_panel_lines(const int8x16_t* first, const int8x16_t* second, int8_t* to) {
QVL_UNROLL_ALL
  for (int q = 0; q < 4; q++) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    const int32x4_t a = vreinterpretq_s32_s8(first[q]), b = vreinterpretq_s32_s8(second[q]);
    vst1q_s8(to + q * 32, vreinterpretq_s8_s32(vzip1q_s32(a, b)));
    vst1q_s8(to + q * 32 + 16, vreinterpretq_s8_s32(vzip2q_s32(a, b)));
#else
    vst1q_s8(to + q * 16, first[q]), vst1q_s8(to + 64 + q * 16, second[q]);
#endif
  }
}

template <int BITS> inline void unpack_lines(const uint8_t* line, const uint8_t* end, uint8_t* to) {
  for (; line < end; line += BITS * 16, to += 128) {
    int8x16_t first[4], second[4];
    __builtin_prefetch(line + kLinesAhead);
QVL_UNROLL_ALL
    for (int q = 0; q < 4; q++) {
      const uint8x16_t one = vld1q_u8(line + q * 16);
      first[q] = BITS == 4 ? low_half(one) : less_128(one);
      second[q] = BITS == 4 ? high_half(one) : less_128(vld1q_u8(line + 64 + q * 16));
    }
    put_panel_lines(first, second, (int8_t*)to);
  }
}

#if defined(__ARM_FEATURE_MATMUL_INT8)
// In tiles for SMMLA, eight inputs of a row are together.
constexpr int64_t inputs_together(int64_t M) { return M == kTileRows ? 8 : 4; }

template <bool NIBBLES, int M, int NB>
inline void unpacked_lines(I (&sums)[M][NB], const uint8_t* at, int64_t stride, const int8_t* x, int64_t lines) {
  static_assert(M == kTileRows && NB == 1, "a tile of pairs of rows");
  (void)stride;
QVL_UNROLL_ALL
  for (int half = 0; half < 2; half++) {
    int32x4_t acc[M / 2][4];  // two rows times two outputs
QVL_UNROLL_ALL
    for (int i = 0; i < M * 2; i++) acc[i / 4][i % 4] = vdupq_n_s32(0);
#pragma GCC unroll 1
    for (int64_t j = 0; j < lines; j += 2) {
      const int8_t* from = (const int8_t*)at + j * 64 + half * 64;
      int8x16_t w[4];
QVL_UNROLL_ALL
      for (int n = 0; n < 4; n++) w[n] = vld1q_s8(from + n * 16);
QVL_UNROLL_ALL
      for (int m = 0; m < M / 2; m++) {
        const int8x16_t rows = vld1q_s8(x + j * 4 * M + m * 16);
QVL_UNROLL_ALL
        for (int n = 0; n < 4; n++) acc[m][n] = vmmlaq_s32(acc[m][n], rows, w[n]);
      }
    }
QVL_UNROLL_ALL
    for (int i = 0; i < M; i++) {
      const int m = i / 2, q = i % 2;
      const int64x2_t a = vreinterpretq_s64_s32(acc[m][2 * q]), b = vreinterpretq_s64_s32(acc[m][2 * q + 1]);
      int32x4_t &one = sums[2 * m][0].v[2 * half + q], &other = sums[2 * m + 1][0].v[2 * half + q];
      one = vaddq_s32(one, vreinterpretq_s32_s64(vtrn1q_s64(a, b)));
      other = vaddq_s32(other, vreinterpretq_s32_s64(vtrn2q_s64(a, b)));
    }
  }
}
#else
constexpr int64_t inputs_together(int64_t) { return 4; }

template <bool NIBBLES, int M, int NB>
inline void unpacked_lines(I (&sums)[M][NB], const uint8_t* at, int64_t stride, const int8_t* x, int64_t lines) {
  add_lines<1>(sums, at, stride, x, lines, false, [](uint8x16_t bytes, int8x16_t* w) { w[0] = vreinterpretq_s8_u8(bytes); });
}
#endif

}  // namespace
