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

// The sums of M rows with NB blocks in a group, as floats to be scaled.
template <int M, int NB> struct GroupSums {
  const Packed& w;
  const Activations& a;
  int64_t tile, block, g;

  // What the sums of a row start with: minus the zero points times the sum of its activations.
  inline void start(I (&sums)[M][NB]) const {
    const int32_t* sum = a.sum + (tile * a.groups + g) * M;
    const int32_t offset = w.bits == 8 && kBytesLess128 ? 128 : 0;
    if (!w.zeros) {
QVL_UNROLL_SUMS
      for (int m = 0; m < M; m++) {
        const I first = iset1((offset - (1 << (w.bits - 1))) * sum[m]);
QVL_UNROLL_SUMS
        for (int n = 0; n < NB; n++) sums[m][n] = first;
      }
      return;
    }
QVL_UNROLL_SUMS
    for (int n = 0; n < NB; n++) {
      const I zeros = isub(iset1(offset), load_u8(w.zeros + ((block + n) * w.groups + g) * 16));
QVL_UNROLL_SUMS
      for (int m = 0; m < M; m++) sums[m][n] = imul(zeros, iset1(sum[m]));
    }
  }

  // Prefetches the scales and zero points of this group and the next ones: their streams are too short for the hardware's
  // prefetcher.
  inline void prefetch() const {
QVL_UNROLL_SUMS
    for (int n = 0; n < NB; n++) {
      const int64_t first = ((block + n) * w.groups + g) * 16;
      if (g % 2 == 0) __builtin_prefetch(w.scales + first);
      if (g % 4 == 0 && w.zeros) __builtin_prefetch(w.zeros + first);
    }
  }

  // acc += the sums, scaled.
  template <class Acc> inline void finish(const I (&sums)[M][NB], const Acc& acc) const {
    const float* by_row = a.scale + (tile * a.groups + g) * M;
QVL_UNROLL_SUMS
    for (int n = 0; n < NB; n++) {
      const F scale = w.scale(block + n, g);
QVL_UNROLL_SUMS
      for (int m = 0; m < M; m++) acc(m, n, to_float(sums[m][n]), mul(scale, set1(by_row[m])));
    }
  }
};

// The rows of a tile, sums [M][NB][16]; those of a row's planes are added up, the highest first.
template <int NB>
inline void put_tile(const Activations& a, const Output& out, int64_t tile, int64_t block, const float* sums) {
  const int64_t each = a.rows_of_tile(), first = tile * each, planes = a.planes;
  for (int64_t m = 0; m < each && first + m < a.rows; m++)
    for (int n = 0; n < NB; n++) {
      F value = load(sums + ((m * planes + planes - 1) * NB + n) * 16);
      for (int64_t p = planes - 2; p >= 0; p--) value = add(value, load(sums + ((m * planes + p) * NB + n) * 16));
      out.put(first + m, (block + n) * 16, value);
    }
}

// A tile of M rows against NB blocks, whose weights are read once: NB streams of memory share M broadcasts.
template <int BITS, int M, int NB>
void few_rows(const Packed& w, const Activations& a, const Output& out, int64_t tile, int64_t block, bool ahead) {
  const int64_t lines = w.group * BITS / 32, stride = w.block_bytes();
  const uint8_t* at_group = w.lines + block * stride;
  const int8_t* x = a.q + tile * M * a.padded;
  F acc[M][NB];
QVL_UNROLL_SUMS
  for (int m = 0; m < M; m++)
QVL_UNROLL_SUMS
    for (int n = 0; n < NB; n++) acc[m][n] = zero();
  for (int64_t g = 0; g < w.groups; g++, at_group += w.group_bytes(), x += w.group * M) {
    const GroupSums<M, NB> group{w, a, tile, block, g};
    I sums[M][NB];
    if (ahead) GroupSums<M, NB>{w, a, tile, block, g + 4}.prefetch();
    group.start(sums);
    if constexpr (BITS == 4) {
      I high[M][NB];
QVL_UNROLL_SUMS
      for (int m = 0; m < M; m++)
QVL_UNROLL_SUMS
        for (int n = 0; n < NB; n++) high[m][n] = iset1(0);
      nibble_lines(sums, high, at_group, stride, x, lines, ahead);
QVL_UNROLL_SUMS
      for (int m = 0; m < M; m++)
QVL_UNROLL_SUMS
        for (int n = 0; n < NB; n++) sums[m][n] = iadd(sums[m][n], shift_high(high[m][n]));
    } else {
      byte_lines(sums, at_group, stride, x, lines, ahead);
    }
    group.finish(sums, [&](int m, int n, F sum, F factor) { acc[m][n] = fma(sum, factor, acc[m][n]); });
  }
  alignas(64) float done[M][NB][16];
QVL_UNROLL_SUMS
  for (int m = 0; m < M; m++)
QVL_UNROLL_SUMS
    for (int n = 0; n < NB; n++) store(done[m][n], acc[m][n]);
  put_tile<NB>(a, out, tile, block, done[0][0]);
}

// Blocks [begin, end): NB at a time, and what is left of one such step in smaller ones.
template <int BITS, int M, int NB>
void blocks_in_turn(const Packed& w, const Activations& a, const Output& out, int64_t begin, int64_t end, bool ahead) {
  constexpr int kHalf = M == 1 && NB > 2 ? NB / 2 : 1;
  int64_t block = begin;
  for (; end - block >= NB; block += NB)
    for (int64_t tile = 0; tile < a.tiles; tile++) few_rows<BITS, M, NB>(w, a, out, tile, block, ahead);
  for (; kHalf > 1 && end - block >= kHalf; block += kHalf)
    for (int64_t tile = 0; tile < a.tiles; tile++) few_rows<BITS, M, kHalf>(w, a, out, tile, block, ahead);
  for (; block < end; block++)
    for (int64_t tile = 0; tile < a.tiles; tile++) few_rows<BITS, M, 1>(w, a, out, tile, block, ahead);
}

// Chunks of at least 128 KiB for as many rounds as all threads have one in, and the rest in as many chunks as there are
// threads: 4096 outputs are 32 chunks of eight blocks, which kept 24 threads busy for two thirds of two rounds. The last
// ones, smaller, also even out what other work takes of a core.
template <int BITS, int M, int NB> void all_blocks(const Packed& w, const Activations& a, const Output& out, bool ahead) {
  const int64_t threads = qvl_threads(), blocks = w.blocks(), least = (64 << 10) / w.block_bytes();
  const int64_t wide = NB * (1 + (128 << 10) / (NB * w.block_bytes()));
  const int64_t whole = blocks / (wide * threads) * threads, left = blocks - whole * wide;
  const int64_t each = (left + threads - 1) / threads, part = each > least ? each : least > 1 ? least : 1;
  parallel(whole + (left + part - 1) / part, [&](int64_t i) {
    const int64_t begin = i < whole ? i * wide : whole * wide + (i - whole) * part, end = begin + (i < whole ? wide : part);
    blocks_in_turn<BITS, M, NB>(w, a, out, begin, end < blocks ? end : blocks, ahead);
  });
}

// A few rows are bound by memory. Whether to prefetch, and how many streams one row reads at once, is measured on the first
// large weights: eight streams with prefetching took a Xeon from 18.2 to 22.4 GB/s, of 24.7 that reading alone reaches,
// where four without took a Zen 4 from 32 to 47. A row has the same bits either way.
template <int BITS, int M, int NB> void few_rows_all(const Packed& w, const Activations& a, const Output& out) {
  static Trial trial;
  const int64_t bytes = w.blocks() * w.block_bytes();
  const Trial::Turn turn = trial.begin(bytes, M == 1 ? 4 : 2);
  const bool ahead = turn.way % 2 == 0;
  if (M > 1 || turn.way < 2) all_blocks<BITS, M, NB>(w, a, out, ahead);
  else if constexpr (M == 1) all_blocks<BITS, M, NB / 2>(w, a, out, ahead);
  trial.end(bytes, turn);
}

}  // namespace

#include "linear/int8_many.inl"

namespace {

template <int BITS, int M>
void few(const void* x, int64_t dtype, int64_t rows, int64_t planes, int64_t inputs, const int32_t* perm, const Packed& w,
         const Output& out) {
  const Activations a = integer_rows(x, dtype, rows, planes, M, inputs, w.groups * w.group, w.group, perm);
  few_rows_all<BITS, M, M == 1 ? kOneRowStreams : M < kFewSums ? kFewSums / M : 1>(w, a, out);
}

// Any number of rows, each as PLANES rows of int8. Up to eight have their weights unpacked in registers.
template <int BITS, int PLANES>
void linear_planes(const void* x, int64_t dtype, int64_t rows, int64_t inputs, const int32_t* perm, const Packed& w,
                   const Output& out) {
  if (rows == 0) return;
  if (rows == 1) return few<BITS, PLANES>(x, dtype, rows, PLANES, inputs, perm, w, out);
  if (rows == 2) return few<BITS, 2 * PLANES>(x, dtype, rows, PLANES, inputs, perm, w, out);
  if constexpr (PLANES == 1) {
    if (rows <= 4) return few<BITS, 4>(x, dtype, rows, PLANES, inputs, perm, w, out);
    if (rows <= 8) return few<BITS, 8>(x, dtype, rows, PLANES, inputs, perm, w, out);
  }
  constexpr int M = kTileRows / PLANES * PLANES, kAtOnce = kTileRowsAtOnce / PLANES;
  for (int64_t first = 0; first < rows; first += kAtOnce) {
    const int64_t count = rows - first < kAtOnce ? rows - first : kAtOnce;
    const Output part{out.bias, at(out.y, dtype, first * out.outputs), dtype, out.outputs};
    const void* from = at(x, dtype, first * inputs);
    many_rows<BITS, M>(w, integer_rows(from, dtype, count, PLANES, M, inputs, w.groups * w.group, w.group, perm), part);
  }
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
  bits == 4 ? linear_planes<4, 1>(x, dtype, rows, inputs, perm, w, out) : linear_planes<8, 1>(x, dtype, rows, inputs, perm, w, out);
}

}  // namespace
