// Quantizes activations to int8, per row and group of inputs: x = scale * q, scale = max |x| / 127 (W4A8 and W8A8).

namespace {

// Rows in int8, padded with zeros to `padded` inputs; the scale and the sum of q for each group.
struct Activations {
  int64_t rows, padded, groups;
  int8_t* q;      // [rows, padded]
  float* scale;   // [rows, groups]
  int32_t* sum;   // [rows, groups]
};

// A row as floats, in the order of the packed weights (permuted if perm is set) and padded with zeros.
void gather_row(const void* x, int64_t dtype, int64_t inputs, int64_t padded, const int32_t* perm, float* out) {
  if (!perm) {
    for (int64_t i = 0; i < padded; i += 16) store(out + i, i < inputs ? load_upto(x, dtype, i, inputs - i) : zero());
    return;
  }
  float* plain = scratch<float>(1, (inputs + 15) / 16 * 16);
  for (int64_t i = 0; i < inputs; i += 16) store(plain + i, load_upto(x, dtype, i, inputs - i));
  for (int64_t i = 0; i < padded; i++) out[i] = perm[i] < 0 ? 0.0f : plain[perm[i]];
}

void quantize_row(const float* x, int64_t group, int64_t groups, int8_t* q, float* scale, int32_t* sums) {
  for (int64_t g = 0; g < groups; g++, x += group, q += group) {
    const float size = largest(x, group);
    const F inverse = set1(size > 0 ? 127.0f / size : 0.0f);
    I total = iset1(0);
    for (int64_t i = 0; i < group; i += 16) {
      I level = nearest(mul(load(x + i), inverse));
      total = iadd(total, level);
      store_i8(q + i, level);
    }
    scale[g] = size / 127.0f;
    sums[g] = isum(total);
  }
}

// Writes `rows_padded` rows; those from `rows` on are zeros.
Activations quantize_rows(const void* x, int64_t dtype, int64_t rows, int64_t rows_padded, int64_t inputs, int64_t padded,
                          int64_t group, const int32_t* perm) {
  Activations a{rows, padded, padded / group, scratch<int8_t>(2, rows_padded * padded), nullptr, nullptr};
  a.scale = scratch<float>(3, rows_padded * a.groups * 2);
  a.sum = (int32_t*)(a.scale + rows_padded * a.groups);
  parallel_ranges(rows_padded, 8, [&](int64_t begin, int64_t end) {
    float* row = scratch<float>(0, padded);
    for (int64_t m = begin; m < end; m++) {
      if (m < rows) {
        gather_row(at(x, dtype, m * inputs), dtype, inputs, padded, perm, row);
        quantize_row(row, group, a.groups, a.q + m * padded, a.scale + m * a.groups, a.sum + m * a.groups);
      } else {
        memset(a.q + m * padded, 0, (size_t)padded);
        memset(a.scale + m * a.groups, 0, (size_t)a.groups * 4), memset(a.sum + m * a.groups, 0, (size_t)a.groups * 4);
      }
    }
  });
  return a;
}

}  // namespace
