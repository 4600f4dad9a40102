// Attention of many query rows: prefill over the paged cache, image patches, the resampler's queries.
//
// FlashAttention-2 (Dao 2023): a job is up to kRowsAtOnce rows of a head, against kKeysAtOnce keys at a time, with a
// running maximum for each row. Keys and values of a pass are converted for the products once, for all strips of rows.
// The products are a policy: AMX tiles for bfloat16 (attention/amx.inl), fused multiply-adds in float otherwise
// (attention/float.inl).

namespace {

constexpr int64_t kRowsAtOnce = 512;
constexpr int64_t kScoreStride = kKeysAtOnce + 16;  // floats; rows 1 KiB apart would share sets of the L1 cache

// A stored vector of any dtype as floats, padded with zeros up to `padded`; int8 without its scale.
inline void widen(const void* from, int64_t dtype, int64_t dim, int64_t padded, float* to) {
  if (dtype != kInt8) {
    for (int64_t i = 0; i < padded; i += 16) store(to + i, i < dim ? load_upto(from, dtype, i, dim - i) : zero());
    return;
  }
  for (int64_t i = 0; i < padded; i += 16) {
    alignas(16) int8_t levels[16] = {0};
    if (i < dim) memcpy(levels, (const int8_t*)from + i, (size_t)(dim - i < 16 ? dim - i : 16));
    store(to + i, to_float(load_i8(levels)));
  }
}

// The scales of the vectors of a pass in an int8 cache. Scores are multiplied by those of the keys, weights by those of
// the values, as in decoding.
struct PassScales {
  alignas(64) float keys[kKeysAtOnce], values[kKeysAtOnce];
  void put(int64_t t, const void* key, const void* value, int64_t dim) {
    keys[t] = cached_scale<kInt8>(key, dim), values[t] = cached_scale<kInt8>(value, dim);
  }
};

template <class Products> void attend_rows(const Job& job) {
  const int64_t padded = (job.dim + 31) / 32 * 32, keys = job.sees(job.rows - 1);
  Products products(job.dim, padded);
  const int64_t held = (job.rows + Products::kStrip - 1) / Products::kStrip * Products::kStrip * padded;
  float* sums = scratch<float>(0, held);  // whole strips, so that products may work in place
  float* scores = scratch<float>(1, Products::kStrip * kScoreStride);
  memset(sums, 0, (size_t)held * 4);
  Softmax softmax[kRowsAtOnce];
  PassScales scales;
  const bool scaled = job.k.dtype == kInt8;
  const float scale = 1.44269504f / __builtin_sqrtf((float)job.dim);
  for (int64_t first = 0; first < keys; first += kKeysAtOnce) {
    const int64_t here = keys - first < kKeysAtOnce ? keys - first : kKeysAtOnce;
    products.take(job, first, here);
    for (int64_t t = 0; scaled && t < here; t++) scales.put(t, job.key(first + t), job.value(first + t), job.dim);
    for (int64_t r = 0; r < job.rows; r += Products::kStrip) {
      const int64_t rows = job.rows - r < Products::kStrip ? job.rows - r : Products::kStrip;
      const int64_t last = job.sees(r + rows - 1) - first, count = last < here ? last : here;
      if (count <= 0) continue;
      const int64_t wide = (count + 31) / 32 * 32;
      products.score(job, r, rows, wide, scores);
      float shrink[Products::kStrip];
      for (int64_t m = 0; m < rows; m++) {
        const int64_t left = job.sees(r + m) - first, seen = left < 0 ? 0 : left < count ? left : count;
        float* row = scores + m * kScoreStride;
        if (scaled) scale_first(row, scales.keys, seen);
        shrink[m] = softmax[r + m].weigh(row, seen, wide, scale);
        if (scaled) scale_first(row, scales.values, seen);
      }
      products.add_values(scores, shrink, rows, wide, sums + r * padded);
    }
  }
  for (int64_t r = 0; r < job.rows; r++) {
    const F part = set1(1.0f / softmax[r].total);
    void* y = job.y.vector(job.row + r, job.head);
    for (int64_t i = 0; i < job.dim; i += 16) store_upto(y, job.y.dtype, i, mul(load(sums + r * padded + i), part), job.dim - i);
  }
}

}  // namespace
