// Packed weights times float activations (exact mode), and dequantization.

namespace {

// M rows against NB blocks of packed weights; x float [rows, padded], sums float [rows, groups].
template <int BITS, int M, int NB>
void exact_rows(const Packed& w, const float* x, const float* sums, int64_t padded, int64_t rows, const Output& out,
                int64_t row, int64_t block) {
  constexpr int kPerLine = 32 / BITS, kMiddle = 1 << (BITS - 1);
  const int64_t lines = w.group / kPerLine, stride = w.block_bytes();
  const uint8_t* at_group = w.lines + block * stride;
  F acc[M][NB];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < NB; n++) acc[m][n] = zero();
  for (int64_t g = 0; g < w.groups; g++, at_group += w.group_bytes()) {
    F even[M][NB], odd[M][NB];  // two chains: a fused multiply-add takes four cycles
    for (int n = 0; n < NB; n++)
      for (int m = 0; m < M; m++) {
        even[m][n] = odd[m][n] = zero();
        if (!w.zeros) continue;
        const F shift = sub(set1(kMiddle), to_float(load_u8(w.zeros + ((block + n) * w.groups + g) * 16)));
        even[m][n] = mul(shift, set1(sums[(row + m) * w.groups + g]));
      }
    for (int64_t j = 0; j < lines; j++)
QVL_UNROLL
      for (int n = 0; n < NB; n++) {
        const Bytes line = load_bytes(at_group + n * stride + j * 64);
        __builtin_prefetch(at_group + n * stride + j * 64 + kLinesAhead);
QVL_UNROLL
        for (int i = 0; i < kPerLine; i++) {
          const F weight = BITS == 4 ? nibble_less_8(line, i < 4 ? 8 * i : 8 * i - 28) : byte_less_128(line, 8 * i);
QVL_UNROLL
          for (int m = 0; m < M; m++) {
            F& sum = i % 2 ? odd[m][n] : even[m][n];
            sum = fma(weight, set1(x[(row + m) * padded + g * w.group + j * kPerLine + i]), sum);
          }
        }
      }
    for (int n = 0; n < NB; n++) {
      const F scale = w.scale(block + n, g);
      for (int m = 0; m < M; m++) acc[m][n] = fma(add(even[m][n], odd[m][n]), scale, acc[m][n]);
    }
  }
  for (int m = 0; m < M && row + m < rows; m++)
    for (int n = 0; n < NB; n++) out.put(row + m, (block + n) * 16, acc[m][n]);
}

template <int BITS, int M>
void exact_all(const Packed& w, const float* x, const float* sums, int64_t padded, int64_t rows, const Output& out) {
  const int64_t pairs = w.blocks() / 2;
  parallel_ranges(pairs, 1 + (64 << 10) / w.block_bytes(), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++)
      for (int64_t row = 0; row < rows; row += M) exact_rows<BITS, M, 2>(w, x, sums, padded, rows, out, row, 2 * b);
  });
  if (w.blocks() % 2)
    for (int64_t row = 0; row < rows; row += M) exact_rows<BITS, M, 1>(w, x, sums, padded, rows, out, row, 2 * pairs);
}

// Rows are padded to a multiple of four, or are fewer than four.
template <int BITS>
void exact_some(const Packed& w, const float* x, const float* sums, int64_t padded, int64_t rows, const Output& out) {
  if (rows == 1) exact_all<BITS, 1>(w, x, sums, padded, rows, out);
  else if (rows == 2) exact_all<BITS, 2>(w, x, sums, padded, rows, out);
  else if (rows == 3) exact_all<BITS, 3>(w, x, sums, padded, rows, out);
  else exact_all<BITS, 4>(w, x, sums, padded, rows, out);
}

// Like linear_int8, without quantizing the activations. Without AMX it is meant for few rows:
// every four rows read the weights again.
void linear_exact(const void* x, int64_t dtype, int64_t rows, int64_t inputs, int64_t padded, const int32_t* perm,
                  const uint8_t* lines, const uint16_t* scales, const uint8_t* zeros, int64_t bits, int64_t group,
                  int64_t outputs, const float* bias, void* y) {
  QVL_CHECK(dtype >= kFloat32 && dtype <= kFloat16 && rows >= 0);
  check_packed(bits, group, inputs, padded, outputs, perm);
  const Packed w{lines, scales, zeros, group, padded / group, outputs, (int)bits};
  const Output out{bias, y, dtype, outputs};
#if defined(__AMX_INT8__)
  if (linear_exact_amx(x, dtype, rows, inputs, perm, w, out)) return;
#endif
  const int64_t step = rows < 4 ? rows : 4, rows_padded = (rows + step - 1) / step * step;
  float* floats = scratch<float>(2, rows_padded * padded);
  float* sums = scratch<float>(3, rows_padded * w.groups);
  for (int64_t m = 0; m < rows_padded; m++) {
    float* row = floats + m * padded;
    if (m < rows) gather_row(at(x, dtype, m * inputs), dtype, inputs, padded, perm, row);
    else memset(row, 0, (size_t)padded * 4);
    for (int64_t g = 0; g < w.groups; g++) {
      F total = zero();
      for (int64_t i = 0; i < group; i += 16) total = add(total, load(row + g * group + i));
      sums[m * w.groups + g] = sum(total);
    }
  }
  bits == 4 ? exact_some<4>(w, floats, sums, padded, rows, out) : exact_some<8>(w, floats, sums, padded, rows, out);
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
