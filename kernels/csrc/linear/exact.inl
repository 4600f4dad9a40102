// Packed weights times float activations (exact mode), and dequantization.
//
// Without AMX a group of a weight has two chains of multiply-adds for each output, of its even and of its odd inputs,
// whose sum is scaled and added to that of the groups before. Few rows, whose weights are unpacked in registers, and
// many, for which they are unpacked once, are the same arithmetic: a row's result depends on no other row.

#if !defined(__AMX_INT8__)
namespace {

// The weights of the i-th input of a line, less the midpoint.
template <int BITS> inline F weights_of(Bytes line, int i) {
  return BITS == 4 ? nibble_less_8(line, i < 4 ? 8 * i : 8 * i - 28) : byte_less_128(line, 8 * i);
}

// x: the inputs of the rows, by group and tile of M rows [groups][tiles][group][M]; sums [rows][groups].
struct ExactRows {
  int64_t rows, tiles;
  const float *x, *sums;
};

// The part of the zero points in a group's sums, which its even chain starts with.
inline F zero_part(const Packed& w, int64_t block, int64_t g, float sum) {
  if (!w.zeros) return zero();
  const F shift = sub(set1((float)(1 << (w.bits - 1))), to_float(load_u8(w.zeros + (block * w.groups + g) * 16)));
  return mul(shift, set1(sum));
}

// A tile of M rows against NB blocks, unpacked in registers.
template <int BITS, int M, int NB>
void exact_rows(const Packed& w, const ExactRows& a, const Output& out, int64_t tile, int64_t block) {
  constexpr int kInputs = 32 / BITS;
  const int64_t lines = w.group * BITS / 32, stride = w.block_bytes(), row = tile * M;
  const uint8_t* at_group = w.lines + block * stride;
  F acc[M][NB];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < NB; n++) acc[m][n] = zero();
  for (int64_t g = 0; g < w.groups; g++, at_group += w.group_bytes()) {
    F even[M][NB], odd[M][NB];  // two chains: a fused multiply-add takes four cycles
    for (int n = 0; n < NB; n++)
      for (int m = 0; m < M; m++)
        even[m][n] = zero_part(w, block + n, g, row + m < a.rows ? a.sums[(row + m) * w.groups + g] : 0), odd[m][n] = zero();
    const float* x = a.x + (g * a.tiles + tile) * w.group * M;
    for (int64_t j = 0; j < lines; j++, x += kInputs * M)
QVL_UNROLL
      for (int n = 0; n < NB; n++) {
        const Bytes line = load_bytes(at_group + n * stride + j * 64);
        __builtin_prefetch(at_group + n * stride + j * 64 + kLinesAhead);
QVL_UNROLL
        for (int i = 0; i < kInputs; i++) {
          const F weight = weights_of<BITS>(line, i);
QVL_UNROLL
          for (int m = 0; m < M; m++) {
            F& sum = i % 2 ? odd[m][n] : even[m][n];
            sum = fma(weight, set1(x[i * M + m]), sum);
          }
        }
      }
    for (int n = 0; n < NB; n++) {
      const F scale = w.scale(block + n, g);
      for (int m = 0; m < M; m++) acc[m][n] = fma(add(even[m][n], odd[m][n]), scale, acc[m][n]);
    }
  }
  for (int m = 0; m < M && row + m < a.rows; m++)
    for (int n = 0; n < NB; n++) out.put(row + m, (block + n) * 16, acc[m][n]);
}

template <int BITS, int M> void exact_few(const Packed& w, const ExactRows& a, const Output& out) {
  constexpr int kStreams = M == 1 ? kExactStreams : 2;
  const int64_t whole = w.blocks() / kStreams;
  parallel_ranges(whole, 1 + (128 << 10) / (kStreams * w.block_bytes()), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++)
      for (int64_t tile = 0; tile < a.tiles; tile++) exact_rows<BITS, M, kStreams>(w, a, out, tile, b * kStreams);
  });
  for (int64_t b = whole * kStreams; b < w.blocks(); b++)
    for (int64_t tile = 0; tile < a.tiles; tile++) exact_rows<BITS, M, 1>(w, a, out, tile, b);
}

// acc [kExactRows][NB][16] += a group of a tile of rows times NB unpacked blocks [NB][group][16].
template <int NB>
void exact_tile(const Packed& w, const ExactRows& a, const float* panels, int64_t block, int64_t g, int64_t tile, float* acc) {
  constexpr int M = kExactRows;
  F even[M][NB], odd[M][NB];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < NB; n++) {
      const int64_t row = tile * M + m;
      even[m][n] = zero_part(w, block + n, g, row < a.rows ? a.sums[row * w.groups + g] : 0), odd[m][n] = zero();
    }
  const float* x = a.x + (g * a.tiles + tile) * w.group * M;
#pragma GCC unroll 1
  for (int64_t k = 0; k < w.group; k += 2, x += 2 * M) {
    F first[NB], second[NB];
#pragma GCC unroll 8
    for (int n = 0; n < NB; n++) first[n] = load(panels + (n * w.group + k) * 16), second[n] = load(panels + (n * w.group + k + 1) * 16);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const F one = set1(x[m]), other = set1(x[M + m]);
#pragma GCC unroll 8
      for (int n = 0; n < NB; n++) even[m][n] = fma(first[n], one, even[m][n]), odd[m][n] = fma(second[n], other, odd[m][n]);
    }
  }
  for (int n = 0; n < NB; n++) {
    const F scale = w.scale(block + n, g);
    for (int m = 0; m < M; m++) {
      float* to = acc + (m * NB + n) * 16;
      store(to, fma(add(even[m][n], odd[m][n]), scale, load(to)));
    }
  }
}

// NB blocks from `block` on against all rows, whose sums are acc [tiles][kExactRows][NB][16].
template <int BITS, int NB>
void exact_group(const Packed& w, const ExactRows& a, int64_t block, int64_t g, float* panels, float* acc) {
  constexpr int kInputs = 32 / BITS;
  for (int n = 0; n < NB; n++) {
    const uint8_t* line = w.lines + (block + n) * w.block_bytes() + g * w.group_bytes();
    float* to = panels + n * w.group * 16;
    for (const uint8_t* end = line + w.group_bytes(); line < end; line += 64, to += kInputs * 16) {
      const Bytes both = load_bytes(line);
QVL_UNROLL
      for (int i = 0; i < kInputs; i++) store(to + i * 16, weights_of<BITS>(both, i));
    }
  }
  for (int64_t tile = 0; tile < a.tiles; tile++)
    exact_tile<NB>(w, a, panels, block, g, tile, acc + tile * kExactRows * NB * 16);
}

constexpr int64_t kExactPanels = 4;  // of kExactBlocks, which share a group's activations from the L2 cache

template <int BITS> void exact_many(const Packed& w, const ExactRows& a, const Output& out) {
  constexpr int NB = kExactBlocks;
  const int64_t count = (w.blocks() + NB - 1) / NB, each = count / (4 * qvl_threads()), per_panel = a.tiles * kExactRows * NB * 16;
  parallel_ranges(count, each < 1 ? 1 : each < kExactPanels ? each : kExactPanels, [&](int64_t begin, int64_t end) {
    float* acc = scratch<float>(5, (end - begin) * per_panel);
    float* panels = scratch<float>(7, NB * w.group * 16);
    memset(acc, 0, (size_t)((end - begin) * per_panel) * 4);
    for (int64_t g = 0; g < w.groups; g++)
      for (int64_t p = begin; p < end; p++) {
        float* sums = acc + (p - begin) * per_panel;
        if (p * NB + NB <= w.blocks()) exact_group<BITS, NB>(w, a, p * NB, g, panels, sums);
        else exact_group<BITS, 1>(w, a, p * NB, g, panels, sums);
      }
    for (int64_t p = begin; p < end; p++) {
      const int64_t here = w.blocks() - p * NB < NB ? 1 : NB;
      for (int64_t m = 0; m < a.rows; m++)
        for (int64_t n = 0; n < here; n++) out.put(m, (p * NB + n) * 16, load(acc + (p - begin) * per_panel + (m * here + n) * 16));
    }
  });
}

constexpr int64_t kExactRowsAtOnce = 264;  // a multiple of every kExactRows
constexpr int64_t kExactFew = 8;  // rows up to which weights are unpacked in registers, four rows at a time

template <int BITS>
void exact(const void* x, int64_t dtype, int64_t rows, int64_t inputs, const int32_t* perm, const Packed& w, const Output& out) {
  const int64_t padded = w.groups * w.group, M = rows > kExactFew ? kExactRows : rows < 4 ? rows : 4;
  ExactRows a{rows, (rows + M - 1) / M, nullptr, nullptr};
  float* tiles = scratch<float>(4, a.tiles * M * w.groups * w.group);
  float* sums = scratch<float>(3, rows * w.groups);
  parallel_ranges(a.tiles * M, rows > kExactFew ? M : a.tiles * M, [&](int64_t begin, int64_t end) {
    float* row = scratch<float>(0, padded);
    for (int64_t m = begin; m < end; m++) {
      if (m < rows) gather_row(at(x, dtype, m * inputs), dtype, inputs, padded, perm, row);
      else memset(row, 0, (size_t)padded * 4);
      for (int64_t g = 0; g < w.groups; g++) {
        const float* from = row + g * w.group;
        float* to = tiles + (g * a.tiles + m / M) * w.group * M + m % M;
        for (int64_t i = 0; i < w.group; i++) to[i * M] = from[i];
        F total = zero();
        for (int64_t i = 0; i < w.group; i += 16) total = add(total, load(from + i));
        if (m < rows) sums[m * w.groups + g] = sum(total);
      }
    }
  });
  a.x = tiles, a.sums = sums;
  if (rows > kExactFew) exact_many<BITS>(w, a, out);
  else if (M == 1) exact_few<BITS, 1>(w, a, out);
  else if (M == 2) exact_few<BITS, 2>(w, a, out);
  else if (M == 3) exact_few<BITS, 3>(w, a, out);
  else exact_few<BITS, 4>(w, a, out);
}

void exact_bits(const void* x, int64_t dtype, int64_t rows, int64_t inputs, const int32_t* perm, const Packed& w, const Output& out) {
  for (int64_t first = 0; first < rows; first += kExactRowsAtOnce) {
    const int64_t count = rows - first < kExactRowsAtOnce ? rows - first : kExactRowsAtOnce;
    const Output part{out.bias, at(out.y, dtype, first * out.outputs), dtype, out.outputs};
    const void* from = at(x, dtype, first * inputs);
    w.bits == 4 ? exact<4>(from, dtype, count, inputs, perm, w, part) : exact<8>(from, dtype, count, inputs, perm, w, part);
  }
}

}  // namespace
#endif

namespace {

// Like linear_int8, without quantizing the activations.
void linear_exact(const void* x, int64_t dtype, int64_t rows, int64_t inputs, int64_t padded, const int32_t* perm,
                  const uint8_t* lines, const uint16_t* scales, const uint8_t* zeros, int64_t bits, int64_t group,
                  int64_t outputs, const float* bias, void* y) {
  QVL_CHECK(dtype >= kFloat32 && dtype <= kFloat16 && rows >= 0);
  check_packed(bits, group, inputs, padded, outputs, perm);
  const Packed w{lines, scales, zeros, group, padded / group, outputs, (int)bits};
  const Output out{bias, y, dtype, outputs};
#if defined(__AMX_INT8__)
  linear_exact_amx(x, dtype, rows, inputs, perm, w, out);
#else
  exact_bits(x, dtype, rows, inputs, perm, w, out);
#endif
}

// Writes outputs [first, first + count) of a packed weight as the columns of y [inputs, count] of `dtype`, the order in a
// line; `first` and `count` are multiples of 16.
void dequantize(const uint8_t* lines, const uint16_t* scales, const uint8_t* zeros, int64_t bits, int64_t group,
                int64_t outputs, int64_t inputs, int64_t padded, const int32_t* perm, int64_t first, int64_t count,
                int64_t dtype, void* y) {
  check_packed(bits, group, inputs, padded, outputs, perm);
  QVL_CHECK(first >= 0 && first % 16 == 0 && count % 16 == 0 && first + count <= (outputs + 15) / 16 * 16);
  const Packed w{lines, scales, zeros, group, padded / group, outputs, (int)bits};
  const int64_t per_line = 32 / bits, line_count = group / per_line;
  parallel_ranges(count / 16, 4, [&](int64_t begin, int64_t end) {
    for (int64_t g = 0; g < w.groups; g++)
      for (int64_t j = 0; j < line_count; j++)
        for (int64_t b = begin; b < end; b++) {
          const int64_t block = first / 16 + b;
          const Bytes line = load_bytes(lines + block * w.block_bytes() + g * w.group_bytes() + j * 64);
          const F scale = w.scale(block, g);
          const F middle = set1((float)(1 << (bits - 1)));
          const F shift = zeros ? sub(middle, to_float(load_u8(zeros + (block * w.groups + g) * 16))) : zero();
          for (int64_t i = 0; i < per_line; i++) {
            const int64_t k = g * group + j * per_line + i, input = perm ? perm[k] : k;
            if (input < 0 || input >= inputs) continue;
            const F level = bits == 4 ? nibble_less_8(line, (int)(i < 4 ? 8 * i : 8 * i - 28)) : byte_less_128(line, (int)(8 * i));
            store_as(y, dtype, input * count + b * 16, mul(add(level, shift), scale));
          }
        }
  });
}

}  // namespace
