// The products of attention/rows.inl in float32. Lanes of scores are keys, lanes of values are channels, and a sum of
// values is one chain over the keys.
//
// Where rows are decoded as well, a score is the number that decode.inl adds up: a chain for each of 16 lanes of channels,
// and their sums in the order of `sum`. Sixteen keys at a time that takes 15 additions and no shuffle. Images are not
// decoded; their scores are one chain over the channels.

namespace {

template <bool DECODED> struct FloatProducts {
  static constexpr int64_t kStrip = kStripRows;

  int64_t dim, padded, channels;  // `channels`: whole lines
  // Keys [kKeysAtOnce / 16][padded][16]; values [padded / 16][kKeysAtOnce][16]; queries [kStrip][kMostDim]; 16 vectors
  // [padded].
  float *keys, *values, *queries, *vectors;

  FloatProducts(int64_t dim, int64_t padded) : dim(dim), padded(padded), channels((dim + 15) / 16 * 16) {
    keys = scratch<float>(4, kKeysAtOnce * padded);
    values = scratch<float>(5, kKeysAtOnce * padded);
    queries = scratch<float>(6, kStrip * kMostDim + 16 * padded);
    vectors = queries + kStrip * kMostDim;
  }

  // A key as floats, in the order of channels in which it is multiplied.
  void widen_key(const void* key, int64_t dtype, float* to) const {
    if (!DECODED || !in_pairs(dtype, dim)) return widen(key, dtype, dim, padded, to);
    for (int64_t i = 0; i < dim; i += 32) {
      F even, odd;
      load_bf16_pairs((const uint16_t*)key + i, even, odd);
      store(to + i, even), store(to + i + 16, odd);
    }
  }

  // Converts `count` keys and values from `first` on, and zeros up to a multiple of 32.
  void take(const Job& job, int64_t first, int64_t count) {
    for (int64_t t = 0; t < (count + 31) / 32 * 32; t++) {
      float* vector = vectors + t % 16 * padded;
      for (const bool is_key : {false, true}) {
        if (t >= count) memset(vector, 0, (size_t)padded * 4);
        else if (is_key) widen_key(job.key(first + t), job.k.dtype, vector);
        else widen(job.value(first + t), job.v.dtype, dim, padded, vector);
        for (int64_t i = 0; !is_key && i < channels; i += 16) store(values + (i * kKeysAtOnce + t * 16), load(vector + i));
      }
      for (int64_t i = 0; t % 16 == 15 && i < channels; i += 16)
        transpose16((const uint32_t*)vectors + i, padded, (uint32_t*)keys + t / 16 * 16 * padded + i * 16);
    }
  }

  // scores [kStrip][kScoreStride] of `rows` queries from row r on, and the first `wide` keys.
  void score(const Job& job, int64_t r, int64_t rows, int64_t wide, float* scores) {
    for (int64_t m = 0; m < kStrip; m++) {
      float* query = queries + m * kMostDim;
      widen(job.q.vector(job.row + r + (m < rows ? m : 0), job.head), job.q.dtype, dim, padded, query);
      if (DECODED) reorder_channels(query, job.k.dtype, dim, true);
    }
    for (int64_t t = 0; t < wide; t += 16 * kStripVectors) {
      F acc[kStripRows][kStripVectors];
      if constexpr (DECODED) {
        add_lanes_of_channels(acc, keys + t * padded);
      } else {
        clear(acc);
        multiply<kMostDim>(acc, queries, keys + t * padded, 16 * padded, dim, 1);
      }
      put(acc, scores + t, kScoreStride);
    }
  }

  // The chains of lane after lane, each added to the sums of as many lanes before it, as a binary tree's leaves are.
  void add_lanes_of_channels(F (&acc)[kStripRows][kStripVectors], const float* panel) const {
    alignas(64) float waiting[4][kStripRows * kStripVectors * 16];
    for (int leaf = 0; leaf < 16; leaf++) {
      const int lane = kSumOrder[leaf];
      clear(acc);
      multiply<kMostDim>(acc, queries + lane, panel + lane * 16, 16 * padded, channels / 16, 16);
      int level = 0;
      for (; leaf >> level & 1; level++)
QVL_UNROLL_SUMS
        for (int i = 0; i < kStripRows * kStripVectors; i++) {
          F& sum = acc[i / kStripVectors][i % kStripVectors];
          sum = add(load(waiting[level] + i * 16), sum);
        }
      if (leaf < 15) put(acc, waiting[level], kStripVectors * 16);
    }
  }

  template <int N> static inline void clear(F (&acc)[kStripRows][N]) {
QVL_UNROLL_SUMS
    for (int i = 0; i < kStripRows * N; i++) acc[i / N][i % N] = zero();
  }
  template <int N> static inline void put(const F (&acc)[kStripRows][N], float* to, int64_t stride) {
QVL_UNROLL_SUMS
    for (int i = 0; i < kStripRows * N; i++) store(to + i / N * stride + i % N * 16, acc[i / N][i % N]);
  }

  // acc[m][n] += x[m][i] * panel[n][i][16] for `count` numbers i, `step` apart. The rows' distance is a constant so that they
  // need no pointers.
  template <int64_t STRIDE, int N>
  static inline void multiply(F (&acc)[kStripRows][N], const float* x, const float* panel, int64_t across, int64_t count, int64_t step) {
#pragma GCC unroll 1
    for (; count > 0; count--, x += step, panel += 16 * step) {
      F lines[N];
QVL_UNROLL_SUMS
      for (int n = 0; n < N; n++) lines[n] = load(panel + n * across);
QVL_UNROLL_SUMS
      for (int m = 0; m < kStripRows; m++) fma_broadcast(acc[m], x + m * STRIDE, lines);
    }
  }

  // sums[m] = shrink[m] * sums[m] + weights[m] times the values; those of a whole strip are there.
  void add_values(const float* weights, const float* shrink, int64_t rows, int64_t wide, float* sums) {
    int64_t i = 0;
    for (; i + 16 * kStripVectors <= channels; i += 16 * kStripVectors) add_values_at<kStripVectors>(i, weights, shrink, rows, wide, sums);
    for (; i < channels; i += 16) add_values_at<1>(i, weights, shrink, rows, wide, sums);
  }

  template <int N>
  void add_values_at(int64_t i, const float* weights, const float* shrink, int64_t rows, int64_t wide, float* sums) const {
    F acc[kStripRows][N];
QVL_UNROLL_SUMS
    for (int k = 0; k < kStripRows * N; k++)
      acc[k / N][k % N] = mul(load(sums + k / N * padded + i + k % N * 16), set1(k / N < rows ? shrink[k / N] : 0.0f));
    multiply<kScoreStride>(acc, weights, values + i * kKeysAtOnce, 16 * kKeysAtOnce, wide, 1);
    put(acc, sums + i, padded);
  }
};

}  // namespace
