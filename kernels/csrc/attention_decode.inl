// Attention of one row, decoding: bound by memory, which is read once, in place.

namespace {

constexpr int64_t kMostDim = 256;

// 16 channels of a cached vector from channel i; int8 without its scale.
template <int DTYPE> inline F cached(const void* vector, int64_t i) {
  return DTYPE == kInt8 ? to_float(load_i8((const int8_t*)vector + i)) : load_as(vector, DTYPE, i);
}
template <int DTYPE> inline float cached_scale(const void* vector, int64_t dim) {
  float scale = 1.0f;
  if (DTYPE == kInt8) memcpy(&scale, (const int8_t*)vector + dim, 4);
  return scale;
}

// A vector held as its lines of 16 channels: LINES of them in registers, or any number in memory where LINES is 0.
// bfloat16 in registers stands as even and odd channels of each 32, which is how `load_bf16_pairs` gives them.
template <int DTYPE, int LINES> struct Lines {
  static constexpr bool kPairs = DTYPE == kBfloat16 && LINES > 0 && LINES % 2 == 0;

  template <class Use> static inline void each(const void* vector, int lines, const Use& use) {
    if (kPairs) {
QVL_UNROLL
      for (int j = 0; j < LINES; j += 2) {
        F even, odd;
        load_bf16_pairs((const uint16_t*)vector + j * 16, even, odd);
        use(j, even), use(j + 1, odd);
      }
    } else {
QVL_UNROLL
      for (int j = 0; j < (LINES ? LINES : lines); j++) use(j, cached<DTYPE>(vector, j * 16));
    }
  }

  // Between channels in order and the order in which `each` gives them.
  static void reorder(float* x, int lines, bool forth) {
    float plain[32];
    for (int j = 0; kPairs && j < lines; j += 2, x += 32) {
      memcpy(plain, x, sizeof plain);
      for (int i = 0; i < 16; i++)
        for (int odd = 0; odd < 2; odd++) forth ? x[16 * odd + i] = plain[2 * i + odd] : x[2 * i + odd] = plain[16 * odd + i];
    }
  }
};

// Asks for the vectors that the next pass of `attend` reads. The cache is scattered in runs of a few KiB, at whose ends
// the machine's own prefetching stops: without this, 10 GB/s where memory gives 20.
inline void prefetch(const char* run, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(run + i);
}

// One row and head over `context` cached tokens, 16 at a time with a running maximum (Milakov and Gimelshein 2018):
// q float [d], y float [d]. Weights are powers of two, with log2(e) / sqrt(d) as the scale of the scores.
template <int DTYPE, int LINES>
void attend(float* q, const Cache& k, const Cache& v, const int64_t* table, int64_t head, int64_t dim, int64_t context, float* y) {
  using Vector = Lines<DTYPE, LINES>;
  const int lines = LINES ? LINES : (int)(dim / 16);
  const int64_t row = k.per_row * size_of(DTYPE);
  const float factor = 1.44269504f / __builtin_sqrtf((float)dim);
  Vector::reorder(q, lines, true);
  F held[LINES ? LINES : kMostDim / 16];
  for (int j = 0; j < lines; j++) held[j] = zero();
  float top = -__builtin_inff(), total = 0;
  for (int64_t start = 0; start < context; start += 16) {
    const int64_t count = context - start < 16 ? context - start : 16;
    const int64_t block = table[start / k.block_size], offset = start % k.block_size;
    const char *keys = (const char*)k.vector(block, head, offset), *values = (const char*)v.vector(block, head, offset);
    const int64_t next = start + 16 < context ? start + 16 : start, ahead = table[next / k.block_size];
    const char *next_keys = (const char*)k.vector(ahead, head, next % k.block_size);
    const char *next_values = (const char*)v.vector(ahead, head, next % k.block_size);
    F partial[16];
    alignas(64) float score[16], scale[16];
    for (int64_t t = 0; t < 16; t++) {
      F a = zero(), b = zero();  // two chains: a fused multiply-add takes four cycles
      if (t < count) {
        prefetch(next_keys + t * row, row);
        Vector::each(keys + t * row, lines, [&](int j, F x) { j % 2 ? b = fma(x, load(q + j * 16), b) : a = fma(x, load(q + j * 16), a); });
      }
      partial[t] = add(a, b);
      scale[t] = t < count ? cached_scale<DTYPE>(keys + t * row, dim) : 0.0f;
    }
    store(score, DTYPE == kInt8 ? mul(row_sums(partial), load(scale)) : row_sums(partial));
    for (int64_t t = count; t < 16; t++) score[t] = -__builtin_inff();
    const float highest_here = highest(load(score)) * factor;
    if (highest_here > top) {
      const F shrink = exp2(set1(top - highest_here));
      for (int j = 0; j < lines; j++) held[j] = mul(held[j], shrink);
      total *= sum(shrink) / 16, top = highest_here;
    }
    store(score, exp2(fma(load(score), set1(factor), set1(-top))));
    for (int64_t t = 0; t < count; t++) {
      prefetch(next_values + t * row, row);
      total += score[t];
      const F weight = set1(score[t] * cached_scale<DTYPE>(values + t * row, dim));
      Vector::each(values + t * row, lines, [&](int j, F x) { held[j] = fma(x, weight, held[j]); });
    }
  }
  for (int j = 0; j < lines; j++) store(y + j * 16, mul(held[j], set1(1.0f / total)));
  Vector::reorder(y, lines, false);
}

using Attend = void (*)(float*, const Cache&, const Cache&, const int64_t*, int64_t, int64_t, int64_t, float*);

// Of the published heads (128), or of any multiple of 16.
template <int DTYPE> Attend attend_for(int64_t dim) { return dim == 128 ? attend<DTYPE, 8> : attend<DTYPE, 0>; }

Attend attend_one(int64_t dtype, int64_t dim) {
  return dtype == kFloat32    ? attend_for<kFloat32>(dim)
         : dtype == kBfloat16 ? attend_for<kBfloat16>(dim)
         : dtype == kFloat16  ? attend_for<kFloat16>(dim)
                              : attend_for<kInt8>(dim);
}

}  // namespace
