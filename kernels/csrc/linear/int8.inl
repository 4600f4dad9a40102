// Packed weights (4 or 8 bits) times int8 activations: one row, few rows, many rows.
//
// Packing: a block is 16 outputs, a group `group` inputs that share a scale; [blocks][groups][lines][64 bytes], and lane
// n of a line holds inputs of output n. 8 bits: line j has inputs 4j .. 4j + 3. 4 bits: byte b of line j has input 8j + b
// in its low nibble and 8j + 4 + b in its high one. Scales are float16 [blocks][groups][16]; zero points uint8 likewise,
// or absent if all are the midpoint, 8 or 128.
//
//   y[m, n] = sum over g of  xs[m, g] * s[n, g] * (sum over k in g of q[n, k] * xq[m, k]  -  z[n, g] * sum of xq[m, k])

namespace {

struct Packed {
  const uint8_t* lines;
  const uint16_t* scales;
  const uint8_t* zeros;
  int64_t group, groups, outputs;
  int bits;
  int64_t group_bytes() const { return 2 * group * bits; }
  int64_t block_bytes() const { return groups * group_bytes(); }
  int64_t blocks() const { return (outputs + 15) / 16; }
  // The initial sum of a group: minus the zero points times the sum of the activations.
  I start(int64_t block, int64_t g, int32_t sum) const {
    if (!zeros) return iset1(-(1 << (bits - 1)) * sum);
    return imul(load_u8(zeros + (block * groups + g) * 16), iset1(-sum));
  }
  F scale(int64_t block, int64_t g) const { return load_f16(scales + (block * groups + g) * 16); }
};

struct Output {
  const float* bias;  // or null
  void* y;            // [rows, outputs]
  int64_t dtype, outputs;
  void put(int64_t row, int64_t column, F value) const {
    const int64_t n = outputs - column;
    if (bias) value = add(value, load_upto(bias, kFloat32, column, n));
    store_upto(y, dtype, row * outputs + column, value, n);
  }
};

// Few rows are memory-bound: prefetching lines this far ahead, in eight streams instead of four, took one row times
// 4096 x 12288 from 18.2 to 22.4 GB/s, of 24.7 that reading alone reaches; two rows take 1.05 times as long as one, not 1.2.
constexpr int64_t kLinesAhead = 1024;

// M rows (padded) against NB blocks, whose weights are read once: NB streams of memory share M broadcasts.
template <int BITS, int M, int NB>
void few_rows(const Packed& w, const Activations& a, const Output& out, int64_t row, int64_t block) {
  const int64_t lines = w.group * BITS / 32, stride = w.block_bytes();
  F acc[M][NB];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < NB; n++) acc[m][n] = zero();
  const uint8_t* at_group = w.lines + block * stride;
  for (int64_t g = 0; g < w.groups; g++, at_group += w.group_bytes()) {
    I low[M][NB], high[M][NB];
    const int8_t* x[M];
    for (int m = 0; m < M; m++) {
      x[m] = a.q + (row + m) * a.padded + g * w.group;
      for (int n = 0; n < NB; n++) low[m][n] = w.start(block + n, g, a.sum[(row + m) * w.groups + g]), high[m][n] = iset1(0);
    }
    for (int64_t j = 0; j < lines; j++) {
QVL_UNROLL
      for (int n = 0; n < NB; n++) {
        const Bytes line = load_bytes(at_group + n * stride + j * 64);
        __builtin_prefetch(at_group + n * stride + j * 64 + kLinesAhead);
        const Bytes first = BITS == 4 ? low_nibbles(line) : line, second = high_nibbles(line);
QVL_UNROLL
        for (int m = 0; m < M; m++) {
          if (BITS == 4) {
            dot_nibbles(low[m][n], first, repeat4(x[m] + 8 * j));
            dot_nibbles(high[m][n], second, repeat4(x[m] + 8 * j + 4));
          } else {
            dot_bytes(low[m][n], first, repeat4(x[m] + 4 * j));
          }
        }
      }
    }
    for (int n = 0; n < NB; n++) {
      const F scale = w.scale(block + n, g);
      for (int m = 0; m < M; m++) {
        const I total = BITS == 4 ? iadd(low[m][n], shift_high(high[m][n])) : low[m][n];
        acc[m][n] = fma(to_float(total), mul(scale, set1(a.scale[(row + m) * w.groups + g])), acc[m][n]);
      }
    }
  }
  for (int m = 0; m < M && row + m < a.rows; m++)
    for (int n = 0; n < NB; n++) out.put(row + m, (block + n) * 16, acc[m][n]);
}

constexpr int kFewRows = 8;  // at once; further rows read the weights from the L2 cache again

template <int BITS, int M, int NB> void few_rows_all(const Packed& w, const Activations& a, const Output& out) {
  const int64_t per_chunk = 1 + (128 << 10) / (NB * w.block_bytes());
  const int64_t whole = w.blocks() / NB, rest = w.blocks() % NB;
  parallel_ranges(whole, per_chunk, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++)
      for (int64_t row = 0; row < a.rows; row += M) few_rows<BITS, M, NB>(w, a, out, row, b * NB);
  });
  for (int64_t b = whole * NB; b < whole * NB + rest; b++)
    for (int64_t row = 0; row < a.rows; row += M) few_rows<BITS, M, 1>(w, a, out, row, b);
}

// One block as unsigned bytes, [padded / 4][64]; 8-bit blocks are stored so.
void unpack_block(const Packed& w, int64_t block, uint8_t* panel) {
  const uint8_t* line = w.lines + block * w.block_bytes();
  for (const uint8_t* end = line + w.block_bytes(); line < end; line += 64, panel += 128) {
    const Bytes both = load_bytes(line);
    store_bytes(panel, low_nibbles(both)), store_bytes(panel + 64, low_high_nibbles(both));
  }
}

// Unpacks two blocks from `block` on to bytes, in scratch memory of the thread; returns how many there are. For a single
// last block the second panel is the first again.
int unpack_pair(const Packed& w, int64_t block, const uint8_t* panels[2]) {
  const int blocks = block + 1 < w.blocks() ? 2 : 1;
  const int64_t bytes = w.groups * w.group * 16;
  uint8_t* unpacked = w.bits == 4 ? scratch<uint8_t>(5, 2 * bytes) : nullptr;
  for (int n = 0; n < blocks; n++) {
    panels[n] = w.bits == 4 ? unpacked + n * bytes : w.lines + (block + n) * w.block_bytes();
    if (w.bits == 4) unpack_block(w, block + n, unpacked + n * bytes);
  }
  if (blocks == 1) panels[1] = panels[0];
  return blocks;
}

// kTileRows x 32 outputs in registers. Activations are [padded / 4][kTileRows] words: in row-major order they would all
// map to one set of the L1 cache, since 4096 inputs are 4 KiB.
void tile(const Packed& w, int64_t block, const uint8_t* const panels[2], int blocks, const int8_t* x, const Activations& a,
          const Output& out, int64_t row) {
  alignas(64) float acc[kTileRows][2][16];
  for (int64_t g = 0, k = 0; g < w.groups; g++) {
    I c[kTileRows][2];
QVL_UNROLL
    for (int m = 0; m < kTileRows; m++)
      for (int n = 0; n < 2; n++) c[m][n] = w.start(block + (n < blocks ? n : 0), g, a.sum[(row + m) * w.groups + g]);
#pragma GCC unroll 1
    for (const int64_t end = k + w.group / 4; k < end; k++) {
      const Bytes w0 = load_bytes(panels[0] + k * 64), w1 = load_bytes(panels[1] + k * 64);
QVL_UNROLL
      for (int m = 0; m < kTileRows; m++) {
        const Bytes words = repeat4(x + (k * kTileRows + m) * 4);
        dot_bytes(c[m][0], w0, words);
        dot_bytes(c[m][1], w1, words);
      }
    }
    for (int n = 0; n < blocks; n++) {
      const F scale = w.scale(block + n, g);
QVL_UNROLL
      for (int m = 0; m < kTileRows; m++) {
        const F factor = mul(scale, set1(a.scale[(row + m) * w.groups + g]));
        const F before = g ? load(acc[m][n]) : zero();
        store(acc[m][n], fma(to_float(c[m][n]), factor, before));
      }
    }
  }
  for (int m = 0; m < kTileRows && row + m < a.rows; m++)
    for (int n = 0; n < blocks; n++) out.put(row + m, (block + n) * 16, load(acc[m][n]));
}

void many_rows(const Packed& w, const Activations& a, const Output& out) {
  const int64_t tiles = (a.rows + kTileRows - 1) / kTileRows, words = a.padded / 4;
  int8_t* packed = scratch<int8_t>(4, tiles * kTileRows * a.padded);
  parallel(tiles, [&](int64_t t) {
    int8_t* to = packed + t * kTileRows * a.padded;
    for (int64_t m = 0; m < kTileRows; m++)
      for (int64_t k = 0; k < words; k++) memcpy(to + (k * kTileRows + m) * 4, a.q + (t * kTileRows + m) * a.padded + k * 4, 4);
  });
  parallel((w.blocks() + 1) / 2, [&](int64_t pair) {
    const uint8_t* panels[2];
    const int blocks = unpack_pair(w, 2 * pair, panels);
    for (int64_t t = 0; t < tiles; t++)
      tile(w, 2 * pair, panels, blocks, packed + t * kTileRows * a.padded, a, out, t * kTileRows);
  });
}

// Pads rows to the number that a kernel computes at once.
int64_t rows_at_once(int64_t rows) { return rows > 2 * kFewRows ? kTileRows : rows == 1 ? 1 : kFewRows; }

template <int BITS> void by_regime(const Packed& w, const Activations& a, const Output& out) {
  if (a.rows == 1) few_rows_all<BITS, 1, kOneRowStreams>(w, a, out);
  else if (a.rows == 2) few_rows_all<BITS, 2, 4>(w, a, out);
  else if (a.rows <= 4) few_rows_all<BITS, 4, 2>(w, a, out);
  else if (a.rows <= 2 * kFewRows) few_rows_all<BITS, kFewRows, 1>(w, a, out);
  else many_rows(w, a, out);
}

#if defined(__AMX_INT8__)
}  // namespace
#include "linear/gemm_amx.inl"

#include "linear/exact_amx.inl"
namespace {
#endif

// x [rows, inputs] of `dtype`; bias float32 [outputs] or null; y [rows, outputs] of `dtype`. perm int32 [padded] is
// the input at each position of the packed order, -1 for padding; null: inputs in order, then zeros.
void linear_int8(const void* x, int64_t dtype, int64_t rows, int64_t inputs, int64_t padded, const int32_t* perm,
                 const uint8_t* lines, const uint16_t* scales, const uint8_t* zeros, int64_t bits, int64_t group,
                 int64_t outputs, const float* bias, void* y) {
  QVL_CHECK(dtype >= kFloat32 && dtype <= kFloat16 && rows >= 0);
  check_packed(bits, group, inputs, padded, outputs, perm);
  const Packed w{lines, scales, zeros, group, padded / group, outputs, (int)bits};
  const Output out{bias, y, dtype, outputs};
#if defined(__AMX_INT8__)
  if (linear_int8_amx(x, dtype, rows, inputs, perm, w, out)) return;
#endif
  const int64_t step = rows_at_once(rows);
  const Activations a = quantize_rows(x, dtype, rows, (rows + step - 1) / step * step, inputs, padded, group, perm);
  bits == 4 ? by_regime<4>(w, a, out) : by_regime<8>(w, a, out);
}

}  // namespace
