// The products of attention/rows.inl in float32. For values the lanes are channels, and a sum is one chain over the keys.
//
// The lanes of scores are channels, too, where rows are decoded as well: added up at the end in the order of decode.inl, so
// that a row's scores are the same numbers there. Images are not decoded; for them lanes are keys, which takes 0.8 times
// as long.

namespace {

template <bool DECODED> struct FloatProducts {
  static constexpr int64_t kStrip = kStripRows, kTiles = kStrip / kDotRows;
  static_assert(kStrip % kDotRows == 0 && 32 % kDotOutputs == 0, "a strip has whole tiles");

  int64_t dim, padded, lines;
  // Keys [kKeysAtOnce][padded], or [kKeysAtOnce / 16][padded][16]; values [padded / 16][kKeysAtOnce][16]; queries
  // [kTiles][lines][kDotRows][16], or [kStrip][kMostDim]; 16 vectors [padded].
  float *keys, *values, *queries, *vectors;

  FloatProducts(int64_t dim, int64_t padded) : dim(dim), padded(padded), lines((dim + 15) / 16) {
    keys = scratch<float>(4, kKeysAtOnce * padded);
    values = scratch<float>(5, kKeysAtOnce * padded);
    queries = scratch<float>(6, kStrip * kMostDim + 16 * padded);
    vectors = queries + kStrip * kMostDim;
  }

  // Converts `count` keys and values from `first` on, and zeros up to a multiple of 32.
  void take(const Job& job, int64_t first, int64_t count) {
    for (int64_t t = 0; t < (count + 31) / 32 * 32; t++) {
      float *key = DECODED ? keys + t * padded : vectors + t % 16 * padded, *value = DECODED ? vectors : key;
      for (const bool is_key : {false, true}) {
        float* to = is_key ? key : value;
        if (t < count) widen(is_key ? job.key(first + t) : job.value(first + t), job.k.dtype, dim, padded, to);
        else memset(to, 0, (size_t)padded * 4);
        for (int64_t i = 0; !is_key && i < padded; i += 16) store(values + (i * kKeysAtOnce + t * 16), load(value + i));
      }
      if (DECODED) reorder_channels(key, job.k.dtype, dim, true);
      for (int64_t i = 0; !DECODED && t % 16 == 15 && i < padded; i += 16)
        transpose16((const uint32_t*)vectors + i, padded, (uint32_t*)keys + t / 16 * 16 * padded + i * 16);
    }
  }

  // scores [kStrip][kScoreStride] of `rows` queries from row r on, and the first `wide` keys.
  void score(const Job& job, int64_t r, int64_t rows, int64_t wide, float* scores) {
    for (int64_t m = 0; m < kStrip; m++) {
      float* query = DECODED ? vectors : queries + m * kMostDim;
      widen(job.q.vector(job.row + r + (m < rows ? m : 0), job.head), job.q.dtype, dim, padded, query);
      if (!DECODED) continue;
      reorder_channels(query, job.k.dtype, dim, true);
      float* to = queries + (m / kDotRows * lines * kDotRows + m % kDotRows) * 16;
      for (int64_t j = 0; j < lines; j++) store(to + j * kDotRows * 16, load(query + j * 16));
    }
    if constexpr (DECODED) score_channels(rows, wide, scores);
    else score_keys(wide, scores);
  }

  void score_channels(int64_t rows, int64_t wide, float* scores) const {
    for (int64_t t = 0; t < wide; t += kDotOutputs)
      for (int64_t tile = 0; tile < kTiles && tile * kDotRows < rows; tile++) {
        const float *x = queries + tile * lines * kDotRows * 16, *from = keys + t * padded;
        F sums[kDotRows][kDotOutputs];
QVL_UNROLL
        for (int m = 0; m < kDotRows; m++)
          for (int n = 0; n < kDotOutputs; n++) sums[m][n] = zero();
        for (int64_t j = 0; j < lines; j++)
          fma_lines(sums, x + j * kDotRows * 16, [&](int n) { return from + n * padded + j * 16; });
        add_lanes<kDotRows, kDotOutputs>(sums, true, scores + tile * kDotRows * kScoreStride + t, kScoreStride);
      }
  }

  void score_keys(int64_t wide, float* scores) const {
    for (int64_t t = 0; t < wide; t += 32) {
      F acc[kStripRows][2];
      for (int m = 0; m < kStripRows; m++) acc[m][0] = acc[m][1] = zero();
      multiply<kMostDim>(acc, queries, keys + t * padded, keys + (t + 16) * padded, dim);
      for (int m = 0; m < kStripRows; m++)
        store(scores + m * kScoreStride + t, acc[m][0]), store(scores + m * kScoreStride + t + 16, acc[m][1]);
    }
  }

  // acc[m] += x[m][0 .. count) times two panels [count][16]. The stride is a constant so that the rows need no pointers.
  template <int64_t STRIDE>
  static inline void multiply(F (&acc)[kStripRows][2], const float* x, const float* left, const float* right, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
      const F a = load(left + i * 16), b = load(right + i * 16);
QVL_UNROLL
      for (int m = 0; m < kStripRows; m++) {
        const F element = set1(x[m * STRIDE + i]);
        acc[m][0] = fma(element, a, acc[m][0]);
        acc[m][1] = fma(element, b, acc[m][1]);
      }
    }
  }

  // sums[m] = shrink[m] * sums[m] + weights[m] times the values.
  void add_values(const float* weights, const float* shrink, int64_t rows, int64_t wide, float* sums) {
    for (int64_t i = 0; i < padded; i += 32) {
      const float *left = values + i * kKeysAtOnce, *right = values + (i + 16) * kKeysAtOnce;
      F acc[kStripRows][2];
      for (int m = 0; m < kStripRows; m++)
        for (int n = 0; n < 2; n++) acc[m][n] = m < rows ? mul(load(sums + m * padded + i + 16 * n), set1(shrink[m])) : zero();
      multiply<kScoreStride>(acc, weights, left, right, wide);
      for (int m = 0; m < rows && m < kStripRows; m++)
        for (int n = 0; n < 2; n++) store(sums + m * padded + i + 16 * n, acc[m][n]);
    }
  }
};

}  // namespace
