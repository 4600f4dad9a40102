// Rotary embedding, fused with the write to the KV cache.
//
// A cache is [blocks, heads, block_size, width]. 16- and 32-bit caches: width is the head size d. int8: width is d + 4,
// d int8 values followed by a float32 scale, x = scale * level, scale = max |x| / 127 of the vector.

namespace {

struct Cache {
  void* data;
  int64_t dtype, block_size, per_block, per_head, per_row;  // the last three in elements
  void* vector(int64_t block, int64_t head, int64_t offset) const {
    return at(data, dtype, block * per_block + head * per_head + offset * per_row);
  }
};

// A cache as it was allocated.
Cache packed_cache(void* data, int64_t dtype, int64_t heads, int64_t block_size, int64_t dim) {
  const int64_t width = dim + (dtype == kInt8 ? 4 : 0);
  return {data, dtype, block_size, heads * block_size * width, block_size * width, width};
}

// `from` continues with zeros up to the next multiple of 16.
void store_vector(void* to, int64_t dtype, int64_t dim, const float* from) {
  if (dtype != kInt8) {
    for (int64_t i = 0; i < dim; i += 16) store_upto(to, dtype, i, load(from + i), dim - i);
    return;
  }
  const float top = largest(from, (dim + 15) / 16 * 16), scale = top / 127.0f;
  alignas(16) int8_t levels[16];
  for (int64_t i = 0; i < dim; i += 16) {
    store_i8(levels, nearest(mul(load(from + i), set1(top > 0 ? 127.0f / top : 0.0f))));
    memcpy((int8_t*)to + i, levels, (size_t)(dim - i < 16 ? dim - i : 16));
  }
  memcpy((int8_t*)to + dim, &scale, 4);
}

// qkv [rows, 3, heads, d]; cos, sin float32 [rows, r]; logn float32 [rows]; slots int64 [rows], below blocks * block_size. q [rows, heads, d] is
// rotated, rounded to `dtype` and scaled by log-n; k is rotated; k and v go to their slots.
void rotary_to_cache(const void* qkv, int64_t dtype, int64_t rows, int64_t heads, int64_t dim, const float* cos,
                     const float* sin, int64_t rotary, const float* logn, const int64_t* slots, void* k_cache, void* v_cache,
                     int64_t cache_dtype, int64_t blocks, int64_t block_size, void* q) {
  QVL_CHECK(heads > 0 && dim > 0 && rotary >= 0 && rotary <= dim && rotary % 2 == 0);
  QVL_CHECK(dtype >= kFloat32 && dtype <= kFloat16 && cache_dtype >= kFloat32 && cache_dtype <= kInt8);
  check_range(slots, rows, 0, blocks * block_size);
  const Cache k = packed_cache(k_cache, cache_dtype, heads, block_size, dim);
  const Cache v = packed_cache(v_cache, cache_dtype, heads, block_size, dim);
  const int64_t padded = (dim + 15) / 16 * 16, half = rotary / 2;
  parallel_ranges(rows * heads, 16, [&](int64_t begin, int64_t end) {
    float* x = scratch<float>(0, 2 * padded);
    float* turned = x + padded;
    for (int64_t i = begin; i < end; i++) {
      const int64_t row = i / heads, head = i % heads, block = slots[row] / block_size, offset = slots[row] % block_size;
      const float *c = cos + row * rotary, *s = sin + row * rotary;
      for (int64_t part = 0; part < 3; part++) {
        const int64_t from = (row * 3 + part) * heads * dim + head * dim;
        for (int64_t j = 0; j < dim; j += 16) store(x + j, load_upto(qkv, dtype, from + j, dim - j));
        if (part == 2) {
          store_vector(v.vector(block, head, offset), cache_dtype, dim, x);
          continue;
        }
        memcpy(turned, x, (size_t)padded * 4);
        for (int64_t j = 0; j < half; j++) {
          turned[j] = x[j] * c[j] - x[j + half] * s[j];
          turned[j + half] = x[j + half] * c[j + half] + x[j] * s[j + half];
        }
        for (int64_t j = 0; j < dim; j += 16) {
          F t = rounded(load(turned + j), dtype);
          if (part == 1) store(turned + j, t);
          else store_upto(q, dtype, i * dim + j, mul(t, rounded(set1(logn[row]), dtype)), dim - j);
        }
        if (part == 1) store_vector(k.vector(block, head, offset), cache_dtype, dim, turned);
      }
    }
  });
}

}  // namespace
