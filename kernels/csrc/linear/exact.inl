// Packed weights times float activations (exact mode), and dequantization.
//
// Without AMX activations are fixed point numbers of 23 or 31 bits in planes of int8 (linear/quantize.inl), and the kernels
// of linear/int8.inl add their products up as integers: a third of the instructions of float products, whose weights must
// be unpacked to floats. A row's result depends on no other row.

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
  if (dtype == kFloat32) bits == 4 ? linear_planes<4, 4>(x, dtype, rows, inputs, perm, w, out) : linear_planes<8, 4>(x, dtype, rows, inputs, perm, w, out);
  else bits == 4 ? linear_planes<4, 3>(x, dtype, rows, inputs, perm, w, out) : linear_planes<8, 3>(x, dtype, rows, inputs, perm, w, out);
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
