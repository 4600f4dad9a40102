// Dense bfloat16 weights times activations, on AMX tiles.
//
// Sixteen rows of a weight [outputs, inputs] and 32 of their inputs form a left-hand tile without any conversion, so that
// weights are read in place, even from a mapped file. The activations are the right-hand side, converted in each call: a
// row of such a tile holds a pair of inputs of sixteen rows of x. The sums come out as [outputs][rows].
//
// Each sum is one chain of products of 32 inputs, in order, for any number of rows: a row's result depends on no other.

namespace {

constexpr int64_t kDenseSteps = 16;  // of 32 inputs: two blocks of this size are 32 KiB, and stay in the L1 cache
constexpr int64_t kStripAhead = 512;  // prefetch distance in a row of weights, bytes
constexpr int64_t kDensePairs = 4;   // pairs of blocks that share the activations of these steps from the L2 cache

// The operands of one call. x: tiles [strips][steps][1 KiB], strips of 16 rows, padded with zeros.
struct DenseTiles {
  const uint8_t* x;
  int64_t rows, strips, steps, inputs;
  const uint16_t* weight;
  int64_t outputs;
  const void* bias;
  uint16_t* y;
  const uint8_t* tile(int64_t strip, int64_t step) const { return x + (rows == 1 ? step * 64 : (strip * steps + step) * kTileBytes); }
  // Whether the 16 outputs from n on and the step's inputs can be read as a tile in place.
  bool whole(int64_t n, int64_t step) const { return n + 16 <= outputs && (step + 1) * 32 <= inputs; }
};

// Copies up to 16 rows of 32 numbers, from column `first` on, to rows of 64 bytes, padded with zeros.
inline void copy_tile(const uint16_t* from, int64_t rows, int64_t columns, int64_t first, uint8_t* to) {
  const int64_t count = columns - first < 32 ? columns - first : 32;
  const __mmask32 there = (__mmask32)((1ull << count) - 1);
  for (int64_t i = 0; i < 16; i++, to += 64)
    _mm512_storeu_si512(to, i < rows ? _mm512_maskz_loadu_epi16(there, from + i * columns + first) : _mm512_setzero_si512());
}

// A single row is a column of pairs as it is: its tiles have 16 rows of four bytes.
void lay_out(const uint16_t* x, const DenseTiles& d, uint8_t* to) {
  if (d.rows == 1) {
    memcpy(to, x, (size_t)d.inputs * 2);
    memset(to + d.inputs * 2, 0, (size_t)(d.steps * 32 - d.inputs) * 2);
    return;
  }
  parallel_ranges(d.strips * d.steps, 16, [&](int64_t begin, int64_t end) {
    alignas(64) uint8_t rows[kTileBytes];
    for (int64_t i = begin; i < end; i++) {
      const int64_t row = i / d.steps * 16, left = d.rows - row < 16 ? d.rows - row : 16;
      copy_tile(x + row * d.inputs, left, d.inputs, i % d.steps * 32, rows);
      transpose16((const uint32_t*)rows, 16, (uint32_t*)(to + i * kTileBytes));
    }
  });
}

// Stores the sums [16 outputs][16 rows], or [16 outputs] of a single row, of the outputs from n on and of a strip in y.
inline void put_sums(const DenseTiles& d, int64_t n, int64_t strip, const float* sums) {
  alignas(64) float rows[256];
  if (d.rows > 1) transpose16((const uint32_t*)sums, 16, (uint32_t*)rows), sums = rows;
  const int64_t count = d.outputs - n < 16 ? d.outputs - n : 16;
  const F bias = d.bias ? load_upto(d.bias, kBfloat16, n, count) : zero();
  for (int64_t m = 0; m < 16 && strip * 16 + m < d.rows; m++)
    store_upto(d.y, kBfloat16, (strip * 16 + m) * d.outputs + n, add(load(sums + m * 16), bias), count);
}

// 16 outputs from n on against one strip: memory-bound, although a product waits for the previous one.
void one_strip(const DenseTiles& d, int64_t n) {
  alignas(64) uint8_t copy[kTileBytes];
  alignas(64) float sums[256];
  const int64_t stride = d.inputs * 2, across = d.rows == 1 ? 4 : 64;
  const uint16_t* weight = d.weight + n * d.inputs;
  _tile_zero(0);
  for (int64_t step = 0; step < d.steps; step++) {
    const char* lines = (const char*)(weight + step * 32);
    if (d.whole(n, step)) {
      for (int i = 0; i < 16; i++) __builtin_prefetch(lines + i * stride + kStripAhead);
      _tile_loadd(4, lines, stride);
    } else {
      copy_tile(weight, d.outputs - n, d.inputs, step * 32, copy);
      _tile_loadd(4, copy, 64);
    }
    _tile_loadd(6, d.tile(0, step), across);
    _tile_dpbf16ps(0, 4, 6);
  }
  _tile_stored(0, sums, across);
  put_sums(d, n, 0, sums);
}

// sums [2 strips][2 blocks][256] += weights of two blocks [2][kDenseSteps][1 KiB] times `steps` tiles of two strips.
inline void two_by_two(const uint8_t* weights, const uint8_t* upper, const uint8_t* lower, int64_t steps, float* sums) {
  _tile_loadd(0, sums, 64);
  _tile_loadd(1, sums + 256, 64);
  _tile_loadd(2, sums + 512, 64);
  _tile_loadd(3, sums + 768, 64);
  for (int64_t k = 0; k < steps; k++) {
    _tile_loadd(4, weights + k * kTileBytes, 64);
    _tile_loadd(6, upper + k * kTileBytes, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, weights + (kDenseSteps + k) * kTileBytes, 64);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(7, lower + k * kTileBytes, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
}

// Pairs of blocks [begin, end) against all strips; an odd last strip is paired with itself.
void many_strips(const DenseTiles& d, int64_t begin, int64_t end) {
  const int64_t strips = (d.strips + 1) / 2 * 2, per_pair = strips * 512;
  float* sums = scratch<float>(7, (end - begin) * per_pair);
  uint8_t* weights = scratch<uint8_t>(5, 2 * kDenseSteps * kTileBytes);
  memset(sums, 0, (size_t)((end - begin) * per_pair) * 4);
  for (int64_t step = 0; step < d.steps; step += kDenseSteps) {
    const int64_t steps = d.steps - step < kDenseSteps ? d.steps - step : kDenseSteps;
    for (int64_t pair = begin; pair < end; pair++) {
      for (int64_t block = 0; block < 2; block++) {
        const int64_t n = (2 * pair + block) * 16;
        uint8_t* to = weights + block * kDenseSteps * kTileBytes;
        for (int64_t k = 0; k < steps; k++)
          copy_tile(d.weight + n * d.inputs, d.outputs - n, d.inputs, (step + k) * 32, to + k * kTileBytes);
      }
      for (int64_t s = 0; s < strips; s += 2) {
        const uint8_t *upper = d.tile(s, step), *lower = s + 1 < d.strips ? d.tile(s + 1, step) : upper;
        two_by_two(weights, upper, lower, steps, sums + (pair - begin) * per_pair + s * 512);
      }
    }
  }
  for (int64_t pair = begin; pair < end; pair++)
    for (int64_t s = 0; s < d.strips; s++)
      for (int64_t block = 0; block < 2 && (2 * pair + block) * 16 < d.outputs; block++)
        put_sums(d, (2 * pair + block) * 16, s, sums + (pair - begin) * per_pair + s * 512 + block * 256);
}

void linear_dense_amx(const uint16_t* x, int64_t rows, int64_t inputs, const uint16_t* weight, int64_t outputs,
                      const void* bias, uint16_t* y) {
  TileConfig config;
  if (rows == 1)
    for (int tile : {0, 6}) config.row_bytes[tile] = 4;
  for (int64_t first = 0; first < rows; first += kRowsOfPanel) {
    const int64_t count = rows - first < kRowsOfPanel ? rows - first : kRowsOfPanel;
    DenseTiles d{nullptr, count, (count + 15) / 16, (inputs + 31) / 32, inputs, weight, outputs, bias, y + first * outputs};
    uint8_t* tiles = scratch<uint8_t>(4, d.strips * d.steps * kTileBytes);
    lay_out(x + first * inputs, d, tiles);
    d.x = tiles;
    const int64_t blocks = (outputs + 15) / 16;
    const int64_t at_once = d.strips == 1 ? 1 + (64 << 10) / (inputs * 32) : 2 * kDensePairs;
    parallel_ranges(blocks, at_once, [&](int64_t begin, int64_t end) {
      load_config(config);
      if (d.strips > 1) many_strips(d, begin / 2, (end + 1) / 2);
      else
        for (int64_t block = begin; block < end; block++) one_strip(d, block * 16);
      _tile_release();
    });
  }
}

}  // namespace
