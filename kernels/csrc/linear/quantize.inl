// Activations as integers, for each row and group of inputs, in tiles of M rows for the kernels of linear/int8.inl.
//
// Rounded (W4A8 and W8A8): x = scale * q, scale = max |x| / 127. Exact: fixed point numbers below the largest of a group,
// held in planes of int8 digits to the base 128, each a row of the tile with a scale of its own. Three planes are 21 bits,
// four 28: a bfloat16 is held as it is unless the largest is 2^13 times larger, and what is lost of others is less than
// what adding the products up in float32 rounds away. No digit is -128, whose sign AVX2 cannot change.

namespace {

// Tiles of M rows: words of four inputs [tiles][padded / 4][M], or of eight (inputs_together), scales and sums of q [tiles][groups][M].
struct Activations {
  int64_t rows, planes, tiles, M, padded, groups;  // rows of the result, each `planes` rows of a tile
  int8_t* q;
  float* scale;
  int32_t* sum;
  int64_t rows_of_tile() const { return M / planes; }
};

constexpr int64_t kMostGroup = 128;

#if !defined(QVL_OWN_PANELS)
// Inputs of a row that are next to each other in a tile of M rows.
constexpr int64_t inputs_together(int64_t) { return 4; }
#endif

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

// q, scale and sum of one group, rounded to int8.
void round_group(const float* x, int64_t group, int8_t* q, float* scale, int32_t* sums) {
  const float size = largest(x, group);
  const F inverse = set1(size > 0 ? 127.0f / size : 0.0f);
  I total = iset1(0);
  for (int64_t i = 0; i < group; i += 16) {
    const I level = nearest(mul(load(x + i), inverse));
    total = iadd(total, level);
    store_i8(q + i, level);
  }
  *scale = size / 127.0f;
  *sums = isum(total);
}

// The factor of a group whose largest number is `size`: a power of two, so that it rounds nothing, and so large that the
// highest digit just fits an int8. NaN for a number that is not finite.
inline float fixed_point(float size, int planes) {
  if (!(size > 0)) return size == 0 ? 0.0f : size;
  const float most = planes == 4 ? 2.663e8f : 2.08e6f;  // a little less than 127 * 128^3 and 127 * 128^2
  float factor = most / size;
  uint32_t bits;
  memcpy(&bits, &factor, 4);
  bits = bits > 0x7e800000u ? 0x7e800000u : bits & 0x7f800000u;  // 2^126 for the smallest: its inverse is a normal number
  memcpy(&factor, &bits, 4);
  return factor;
}

// The scale of the first plane of a group that is not finite: infinity, with the level of a single infinite number 1 or -1
// and all others 0; NaN otherwise.
inline float infinite_levels(const float* x, int64_t group, int32_t* levels) {
  int64_t found = 0, lost = 0;
  for (int64_t i = 0; i < group; i++) {
    const bool infinite = __builtin_isinf(x[i]);
    levels[i] = !infinite ? 0 : x[i] > 0 ? 1 : -1;
    found += infinite, lost += __builtin_isnan(x[i]);
  }
  return found == 1 && !lost ? __builtin_inff() : __builtin_nanf("");
}

// q [planes][group], scale and sums [planes] of one group.
void split_group(const float* x, int64_t group, int planes, int8_t* q, float* scale, int32_t* sums) {
  alignas(64) int32_t levels[kMostGroup];
  const float size = largest(x, group), factor = fixed_point(size, planes);
  const bool finite = size == size;
  for (int64_t i = 0; finite && i < group; i += 16) {
    const I level = nearest(mul(load(x + i), set1(factor)));
    memcpy(levels + i, &level, 64);
  }
  const float infinite = finite ? 0.0f : infinite_levels(x, group, levels);
  float step = factor > 0 ? 1.0f / factor : 0.0f;
  for (int p = 0; p < planes; p++, step *= 128.0f) {
    I total = iset1(0);
    for (int64_t i = 0; i < group; i += 16) {
      I level, digit;
      memcpy(&level, levels + i, 64);
      const I next = p + 1 < planes ? shift_digit(iadd(level, iset1(64))) : iset1(0);
      digit = isub(level, imul(next, iset1(128)));
      memcpy(levels + i, &next, 64);
      store_i8(q + p * group + i, digit);
      total = iadd(total, digit);
    }
    scale[p] = finite ? step : p ? 0.0f : infinite;
    sums[p] = isum(total);
  }
}

// A row of the result as `planes` rows of a tile from the m-th on; of zeros if x is null.
void put_row(const float* x, int64_t group, const Activations& a, int64_t tile, int64_t m) {
  alignas(64) int8_t q[4 * kMostGroup] = {0};
  float scale[4] = {0};
  int32_t sums[4] = {0};
  const int64_t together = inputs_together(a.M);
  for (int64_t g = 0; g < a.groups; g++) {
    if (x) {
      if (a.planes == 1) round_group(x + g * group, group, q, scale, sums);
      else split_group(x + g * group, group, (int)a.planes, q, scale, sums);
    }
    int8_t* to = a.q + ((tile * a.padded + g * group) * a.M + m * together);
    for (int64_t p = 0; p < a.planes; p++, to += together) {
      if (together == 8)
        for (int64_t k = 0; k < group; k += 8) memcpy(to + k * a.M, q + p * group + k, 8);
      else
        for (int64_t k = 0; k < group; k += 4) memcpy(to + k * a.M, q + p * group + k, 4);
      a.scale[(tile * a.groups + g) * a.M + m + p] = scale[p];
      a.sum[(tile * a.groups + g) * a.M + m + p] = sums[p];
    }
  }
}

// Rows past the last, up to a whole tile, are zeros.
Activations integer_rows(const void* x, int64_t dtype, int64_t rows, int64_t planes, int64_t M, int64_t inputs,
                         int64_t padded, int64_t group, const int32_t* perm) {
  Activations a{rows, planes, 0, M, padded, padded / group, nullptr, nullptr, nullptr};
  const int64_t each = a.rows_of_tile();
  a.tiles = (rows + each - 1) / each;
  a.q = scratch<int8_t>(2, a.tiles * M * padded);
  a.scale = scratch<float>(3, a.tiles * M * a.groups * 2);
  a.sum = (int32_t*)(a.scale + a.tiles * M * a.groups);
  parallel_ranges(a.tiles, rows <= 4 ? a.tiles : 1, [&](int64_t begin, int64_t end) {
    float* row = scratch<float>(0, padded);
    for (int64_t m = begin * each; m < end * each; m++) {
      if (m < rows) gather_row(at(x, dtype, m * inputs), dtype, inputs, padded, perm, row);
      put_row(m < rows ? row : nullptr, group, a, m / each, m % each * planes);
    }
  });
  return a;
}

}  // namespace
