// The products of attention/rows.inl on AMX tiles, for bfloat16: 16 rows x 32 channels times 32 channels x 16 columns.
//
// A row of the right-hand tile holds pairs of channels of sixteen columns. For scores, columns are keys: their vectors,
// as words of two channels, are transposed. For values, columns are channels: two neighboring keys are interleaved.
#include <immintrin.h>

namespace {

// 16 levels of an int8 cache as the lower halves of words of bfloat16, and 16 as the upper ones. Whole numbers below 256:
// the lower halves of their floats are zero.
inline I level_pairs(const int8_t* lower, const int8_t* upper) {
  const I low = _mm512_castps_si512(to_float(load_i8(lower))), high = _mm512_castps_si512(to_float(load_i8(upper)));
  return _mm512_or_si512(_mm512_srli_epi32(low, 16), high);
}

// The channels of a vector as `level_pairs` of the halves of each 32 returns those of an int8 key: 0 16 1 17 and so on.
inline void interleave_halves(uint16_t* x, int64_t dim) {
  uint16_t plain[32];
  for (const uint16_t* end = x + dim; x < end; x += 32) {
    memcpy(plain, x, sizeof plain);
    for (int i = 0; i < 32; i++) x[i] = plain[i / 2 + i % 2 * 16];
  }
}

struct AmxProducts {
  static constexpr int64_t kStrip = 32;
  static constexpr int64_t kTile = 512;  // bfloat16 in a tile, 1 KiB

  int64_t dim, padded, steps;  // steps of 32 channels
  uint16_t *keys, *values;      // tiles [keys / 16][steps] and [keys / 32][2 * steps]
  uint16_t *queries, *weights; // tiles [2][steps] and [2][kKeysAtOnce / 32]
  uint16_t* rows;               // [32][padded], to be copied into tiles

  AmxProducts(int64_t dim, int64_t padded) : dim(dim), padded(padded), steps(padded / 32) {
    keys = scratch<uint16_t>(4, kKeysAtOnce * padded);
    values = scratch<uint16_t>(5, kKeysAtOnce * padded);
    queries = scratch<uint16_t>(6, 2 * kStrip * padded + kStrip * kKeysAtOnce);
    rows = queries + kStrip * padded, weights = rows + kStrip * padded;
    static const TileConfig config;
    _tile_loadconfig(&config);
  }
  ~AmxProducts() { _tile_release(); }

  // A stored vector as bfloat16, followed by zeros; int8 without its scale, which is exact.
  void narrow(const void* from, int64_t dtype, uint16_t* to) const {
    if (dtype == kBfloat16) {
      memcpy(to, from, (size_t)dim * 2);
      memset(to + dim, 0, (size_t)(padded - dim) * 2);
      return;
    }
    float* floats = scratch<float>(7, padded);
    widen(from, dtype, dim, padded, floats);
    for (int64_t i = 0; i < padded; i += 16) store_bf16(to + i, load(floats + i));
  }

  // 32 vectors from `first + t` on, zeros from `count` on.
  template <class Vector> void gather(const Vector& vector, int64_t dtype, int64_t first, int64_t t, int64_t count) {
    for (int64_t i = 0; i < 32; i++) {
      if (t + i < count) narrow(vector(first + t + i), dtype, rows + i * padded);
      else memset(rows + i * padded, 0, (size_t)padded * 2);
    }
  }

  void take(const Job& job, int64_t first, int64_t count) {
    for (int64_t t = 0; t < count; t += 32) {
      gather([&](int64_t token) { return job.key(token); }, job.k.dtype, first, t, count);
      for (int64_t i = 0; job.k.dtype == kInt8 && i < 32; i++) interleave_halves(rows + i * padded, padded);
      for (int64_t half = 0; half < 2; half++)
        for (int64_t s = 0; s < steps; s++)
          transpose16((const uint32_t*)(rows + half * 16 * padded) + s * 16, padded / 2, (uint32_t*)(keys + ((t / 16 + half) * steps + s) * kTile));
      gather([&](int64_t token) { return job.value(token); }, job.v.dtype, first, t, count);
      for (int64_t pair = 0; pair < 16; pair++)
        for (int64_t n = 0; n < 2 * steps; n++) {
          const uint16_t* even = rows + 2 * pair * padded + n * 16;
          const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)even));
          const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(even + padded)));
          _mm512_storeu_si512(values + (t / 32 * 2 * steps + n) * kTile + pair * 32, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
  }

  // Tiles 0 to 3 += two tiles of rows times two of columns, `count` of each, `across` elements apart. One strip of 16
  // rows does not use tiles 2 and 3.
  static inline void multiply(const uint16_t* upper, const uint16_t* lower, const uint16_t* left, const uint16_t* right,
                              int64_t across, int64_t count, bool both) {
    for (int64_t i = 0; i < count; i++) {
      _tile_loadd(4, upper + i * kTile, 64);
      _tile_loadd(6, left + i * across, 64);
      _tile_loadd(7, right + i * across, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (!both) continue;
      _tile_loadd(5, lower + i * kTile, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }

  void score(const Job& job, int64_t r, int64_t count, int64_t wide, float* scores) {
    for (int64_t m = 0; m < kStrip; m++) {
      uint16_t* row = rows + m * padded;
      if (m < count) narrow(job.q.vector(job.row + r + m, job.head), job.q.dtype, row);
      else memset(row, 0, (size_t)padded * 2);
      if (job.k.dtype == kInt8) interleave_halves(row, padded);
      for (int64_t s = 0; s < steps; s++) memcpy(queries + (m / 16 * steps + s) * kTile + m % 16 * 32, row + s * 32, 64);
    }
    const int stride = (int)(kScoreStride * 4);
    for (int64_t t = 0; t < wide; t += 32) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      const uint16_t* left = keys + t / 16 * steps * kTile;
      multiply(queries, queries + steps * kTile, left, left + steps * kTile, kTile, steps, count > 16);
      _tile_stored(0, scores + t, stride);
      _tile_stored(1, scores + t + 16, stride);
      if (count <= 16) continue;
      _tile_stored(2, scores + 16 * kScoreStride + t, stride);
      _tile_stored(3, scores + 16 * kScoreStride + t + 16, stride);
    }
  }

  void add_values(const float* scores, const float* shrink, int64_t count, int64_t wide, float* sums) {
    for (int64_t m = 0; m < kStrip; m++) {
      uint16_t* to = weights + m / 16 * (kKeysAtOnce / 32) * kTile + m % 16 * 32;
      for (int64_t t = 0; t < wide; t += 32, to += kTile)
        for (int64_t i = 0; i < 32; i += 16) store_bf16(to + i, m < count ? load(scores + m * kScoreStride + t + i) : zero());
      if (m < count && shrink[m] != 1.0f)
        for (int64_t i = 0; i < padded; i += 16) store(sums + m * padded + i, mul(load(sums + m * padded + i), set1(shrink[m])));
    }
    const int64_t stride = padded * 4, lower = 16 * padded;
    for (int64_t n = 0; n < 2 * steps; n += 2, sums += 32) {
      _tile_loadd(0, sums, stride);
      _tile_loadd(1, sums + 16, stride);
      _tile_loadd(2, sums + lower, stride);
      _tile_loadd(3, sums + lower + 16, stride);
      const uint16_t* left = values + n * kTile;
      multiply(weights, weights + kKeysAtOnce / 32 * kTile, left, left + kTile, 2 * steps * kTile, wide / 32, count > 16);
      _tile_stored(0, sums, stride);
      _tile_stored(1, sums + 16, stride);
      _tile_stored(2, sums + lower, stride);
      _tile_stored(3, sums + lower + 16, stride);
    }
  }
};

}  // namespace
