// One or two rows of float activations with packed weights where more use AMX tiles: the same numbers as
// linear/gemm_amx.inl, from registers. A tile's product of 32 inputs is defined (Intel's manual, TDPBF16PS) as two chains
// of fused multiply-adds from zero, of the even and of the odd element of each pair, whose sum is added to the result,
// denormals being zeros.

namespace {

// M rows against NB blocks; x: the planes of each input [rows][padded][PLANES], sums [rows][groups].
template <int BITS, int PLANES, int M, int NB>
void exact_rows_as_tiles(const Packed& w, const float* x, const float* sums, const Output& out, int64_t block) {
  constexpr int kPerLine = 32 / BITS, kLines = BITS;  // inputs of a line, and lines of 32 inputs
  static constexpr int kOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};  // how nibbles pair: see Bfloat16
  const int64_t stride = w.block_bytes(), tiles = w.group % 64 ? 1 : 2, steps = w.group / 32 / tiles, padded = w.groups * w.group;
  const uint8_t* line = w.lines + block * stride;
  F acc[M][NB];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < NB; n++) acc[m][n] = zero();
  for (int64_t step = 0; step < w.groups * steps; step++) {
    const int64_t g = step / steps;
    F all[M][NB];
    for (int m = 0; m < M; m++)
      for (int n = 0; n < NB; n++) all[m][n] = zero();
    for (int64_t tile = 0; tile < tiles; tile++, x += 32 * PLANES) {
      F chains[M][NB][PLANES][2];
QVL_UNROLL
      for (int i = 0; i < M * NB * PLANES * 2; i++) (&chains[0][0][0][0])[i] = zero();
      for (int j = 0; j < kLines; j++, line += 64)
QVL_UNROLL
        for (int n = 0; n < NB; n++) {
          const Bytes weights = load_bytes(line + n * stride);
          __builtin_prefetch(line + n * stride + kLinesAhead);
QVL_UNROLL
          for (int q = 0; q < kPerLine; q++) {
            const int i = BITS == 4 ? kOrder[q] : q;
            const F weight = BITS == 4 ? nibble_less_8(weights, i < 4 ? 8 * i : 8 * i - 28) : byte_less_128(weights, 8 * i);
QVL_UNROLL
            for (int m = 0; m < M; m++)
QVL_UNROLL
              for (int p = 0; p < PLANES; p++)
                chains[m][n][p][q % 2] = fma(weight, set1(x[(m * padded + j * kPerLine + i) * PLANES + p]), chains[m][n][p][q % 2]);
          }
        }
QVL_UNROLL
      for (int m = 0; m < M; m++)
QVL_UNROLL
        for (int n = 0; n < NB; n++)
QVL_UNROLL
          for (int p = 0; p < PLANES; p++) all[m][n] = add(all[m][n], add(chains[m][n][p][0], chains[m][n][p][1]));
    }
    for (int n = 0; n < NB; n++) {
      const F scale = w.scale(block + n, g);
      for (int m = 0; m < M; m++) acc[m][n] = fma(all[m][n], scale, acc[m][n]);
      if (!w.zeros || step % steps) continue;
      const F shift = to_float(isub(iset1(1 << (BITS - 1)), load_u8(w.zeros + ((block + n) * w.groups + g) * 16)));
      for (int m = 0; m < M; m++) acc[m][n] = fma(mul(scale, shift), set1(sums[m * w.groups + g]), acc[m][n]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < NB; n++) out.put(m, (block + n) * 16, acc[m][n]);
}

template <int BITS, int PLANES, int M>
void exact_few_as_tiles(const void* x, int64_t dtype, int64_t inputs, const int32_t* perm, const Packed& w, const Output& out) {
  constexpr int kStreams = M * PLANES == 1 ? 4 : 2;
  const int64_t padded = w.groups * w.group;
  float *row = scratch<float>(0, padded), *sums = scratch<float>(3, M * w.groups), *planes = scratch<float>(2, M * padded * PLANES);
  for (int64_t m = 0; m < M; m++) {
    gather_row(at(x, dtype, m * inputs), dtype, inputs, padded, perm, row);
    for (int64_t g = 0; g < w.groups; g++) {
      F total = zero();
      for (int64_t i = 0; i < w.group; i += 16) total = add(total, load(row + g * w.group + i));
      sums[m * w.groups + g] = sum(total);
    }
    for (int64_t i = 0; i < padded; i += 16) {
      F value = load(row + i);
      for (int p = 0; p < PLANES; p++) {
        alignas(64) float plane[16];
        store(plane, Bfloat16<PLANES>::upper(value));
        value = Bfloat16<PLANES>::rest(value);
        for (int k = 0; k < 16; k++) planes[(m * padded + i + k) * PLANES + p] = plane[k];
      }
    }
  }
  const int64_t whole = w.blocks() / kStreams;
  parallel_ranges(whole, 1 + (128 << 10) / (kStreams * w.block_bytes()), [&](int64_t begin, int64_t end) {
    const NoDenormals here;
    for (int64_t b = begin; b < end; b++) exact_rows_as_tiles<BITS, PLANES, M, kStreams>(w, planes, sums, out, b * kStreams);
  });
  const NoDenormals here;
  for (int64_t b = whole * kStreams; b < w.blocks(); b++) exact_rows_as_tiles<BITS, PLANES, M, 1>(w, planes, sums, out, b);
}

// Any number of rows, so that the sums of one are those that it has among many.
template <int BITS, int PLANES>
void linear_exact_planes(const void* x, int64_t dtype, int64_t rows, int64_t inputs, const int32_t* perm, const Packed& w,
                         const Output& out) {
  if (rows == 1) return exact_few_as_tiles<BITS, PLANES, 1>(x, dtype, inputs, perm, w, out);
  if constexpr (PLANES == 1) {
    if (rows == 2) return exact_few_as_tiles<BITS, PLANES, 2>(x, dtype, inputs, perm, w, out);
  }
  linear_amx<Bfloat16<PLANES>, BITS>(x, dtype, rows, inputs, perm, w, out);
}

template <int BITS>
void linear_exact_bits(const void* x, int64_t dtype, int64_t rows, int64_t inputs, const int32_t* perm, const Packed& w,
                       const Output& out) {
  if (dtype == kBfloat16) linear_exact_planes<BITS, 1>(x, dtype, rows, inputs, perm, w, out);
  else if (dtype == kFloat16) linear_exact_planes<BITS, 2>(x, dtype, rows, inputs, perm, w, out);
  else linear_exact_planes<BITS, 3>(x, dtype, rows, inputs, perm, w, out);
}

void linear_exact_amx(const void* x, int64_t dtype, int64_t rows, int64_t inputs, const int32_t* perm, const Packed& w,
                      const Output& out) {
  w.bits == 4 ? linear_exact_bits<4>(x, dtype, rows, inputs, perm, w, out) : linear_exact_bits<8>(x, dtype, rows, inputs, perm, w, out);
}

}  // namespace
