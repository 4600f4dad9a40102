// The products of attention/rows.inl in float32: kTileRows x 32 sums in registers, as in a GEMM.

namespace {

struct FloatProducts {
  static constexpr int64_t kStrip = kTileRows;

  int64_t dim, padded;
  float *keys, *values, *queries;  // [keys / 16][padded][16]; [padded / 16][kKeysAtOnce][16]; [kStrip][kMostDim]

  FloatProducts(int64_t dim, int64_t padded) : dim(dim), padded(padded) {
    keys = scratch<float>(4, kKeysAtOnce * padded);
    values = scratch<float>(5, kKeysAtOnce * padded);
    queries = scratch<float>(6, kStrip * kMostDim + 16 * padded);
  }

  // Copies `count` keys and values from `first` on to panels, padded with zeros to a multiple of 32.
  void take(const Job& job, int64_t first, int64_t count) {
    float* rows = queries + kStrip * kMostDim;  // 16 keys
    for (int64_t t = 0; t < (count + 31) / 32 * 32; t++) {
      float* key = rows + t % 16 * padded;
      if (t < count) {
        const int64_t block = job.table[(first + t) / job.k.block_size], offset = (first + t) % job.k.block_size;
        widen(job.v.vector(block, job.head, offset), job.v.dtype, dim, padded, key);
        for (int64_t i = 0; i < padded; i += 16) store(values + (i * kKeysAtOnce + t * 16), load(key + i));
        widen(job.k.vector(block, job.head, offset), job.k.dtype, dim, padded, key);
      } else {
        memset(key, 0, (size_t)padded * 4);
        for (int64_t i = 0; i < padded; i += 16) store(values + (i * kKeysAtOnce + t * 16), zero());
      }
      if (t % 16 < 15) continue;
      for (int64_t i = 0; i < padded; i += 16)
        transpose16((const uint32_t*)rows + i, padded, (uint32_t*)keys + t / 16 * 16 * padded + i * 16);
    }
  }

  // acc[m] += x[m][0 .. count) times two panels [count][16]. The stride is a constant so that the rows need no pointers.
  template <int64_t STRIDE>
  static inline void multiply(F (&acc)[kTileRows][2], const float* x, const float* left, const float* right, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
      const F a = load(left + i * 16), b = load(right + i * 16);
QVL_UNROLL
      for (int m = 0; m < kTileRows; m++) {
        const F element = set1(x[m * STRIDE + i]);
        acc[m][0] = fma(element, a, acc[m][0]);
        acc[m][1] = fma(element, b, acc[m][1]);
      }
    }
  }

  // scores [kStrip][kScoreStride] of `rows` queries from row r on, and the first `wide` keys.
  void score(const Job& job, int64_t r, int64_t rows, int64_t wide, float* scores) {
    for (int64_t m = 0; m < kStrip; m++)
      widen(job.q.vector(job.row + r + (m < rows ? m : 0), job.head), job.q.dtype, dim, padded, queries + m * kMostDim);
    for (int64_t t = 0; t < wide; t += 32) {
      F acc[kTileRows][2];
      for (int m = 0; m < kTileRows; m++) acc[m][0] = acc[m][1] = zero();
      multiply<kMostDim>(acc, queries, keys + t * padded, keys + (t + 16) * padded, dim);
      for (int m = 0; m < kTileRows; m++)
        store(scores + m * kScoreStride + t, acc[m][0]), store(scores + m * kScoreStride + t + 16, acc[m][1]);
    }
  }

  // sums[m] = shrink[m] * sums[m] + weights[m] times the values.
  void add_values(const float* weights, const float* shrink, int64_t rows, int64_t wide, float* sums) {
    for (int64_t i = 0; i < padded; i += 32) {
      F acc[kTileRows][2];
      for (int m = 0; m < kTileRows; m++)
        for (int n = 0; n < 2; n++) acc[m][n] = m < rows ? mul(load(sums + m * padded + i + 16 * n), set1(shrink[m])) : zero();
      multiply<kScoreStride>(acc, weights, values + i * kKeysAtOnce, values + (i + 16) * kKeysAtOnce, wide);
      for (int m = 0; m < rows && m < kTileRows; m++)
        for (int n = 0; n < 2; n++) store(sums + m * padded + i + 16 * n, acc[m][n]);
    }
  }
};

}  // namespace
