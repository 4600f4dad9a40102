// Rotary embedding with the cache write, and attention of few rows over a paged cache.
//
// A cache is [blocks, heads, block_size, width]. 16- and 32-bit caches: width is the head size d. int8: width is d + 4,
// d levels and a float32 scale behind them, x = scale * level, scale = max |x| / 127 of the vector.

namespace {

struct Cache {
  void* data;
  int64_t dtype, heads, block_size, head_dim;
  int64_t width() const { return head_dim + (dtype == kInt8 ? 4 : 0); }
  void* vector(int64_t block, int64_t head, int64_t offset) const {
    return at(data, dtype, ((block * heads + head) * block_size + offset) * width());
  }
};

// `from` has room up to the next multiple of 16.
void store_vector(void* to, int64_t dtype, int64_t dim, const float* from) {
  if (dtype != kInt8) {
    for (int64_t i = 0; i < dim; i += 16) store_upto(to, dtype, i, load(from + i), dim - i);
    return;
  }
  float top = 0;
  for (int64_t i = 0; i < dim; i++) top = __builtin_fabsf(from[i]) > top ? __builtin_fabsf(from[i]) : top;
  const float scale = top / 127.0f;
  alignas(16) int8_t levels[16];
  for (int64_t i = 0; i < dim; i += 16) {
    store_i8(levels, nearest(mul(load(from + i), set1(top > 0 ? 127.0f / top : 0.0f))));
    memcpy((int8_t*)to + i, levels, (size_t)(dim - i < 16 ? dim - i : 16));
  }
  memcpy((int8_t*)to + dim, &scale, 4);
}

// qkv [rows, 3, heads, d]; cos, sin float32 [rows, r]; logn float32 [rows]; slots int64 [rows]. q [rows, heads, d] is
// rotated, rounded to `dtype` and scaled by log-n; k is rotated; k and v go to their slots.
void rotary_to_cache(const void* qkv, int64_t dtype, int64_t rows, int64_t heads, int64_t dim, const float* cos,
                     const float* sin, int64_t rotary, const float* logn, const int64_t* slots, void* k_cache, void* v_cache,
                     int64_t cache_dtype, int64_t block_size, void* q) {
  const Cache k{k_cache, cache_dtype, heads, block_size, dim}, v{v_cache, cache_dtype, heads, block_size, dim};
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

constexpr int64_t kMostDim = 256;

template <int DTYPE> inline F cached(const void* vector, int64_t i) {
  return DTYPE == kInt8 ? to_float(load_i8((const int8_t*)vector + i)) : load_as(vector, DTYPE, i);
}
template <int DTYPE> inline float cached_scale(const void* vector, int64_t dim) {
  float scale = 1.0f;
  if (DTYPE == kInt8) memcpy(&scale, (const int8_t*)vector + dim, 4);
  return scale;
}

// One row and head over `context` cached tokens, block by block with a running maximum (Milakov and Gimelshein 2018):
// q float [d], scaled already; y float [d]. LINES is d / 16 where the sum stays in registers, or 0: it stays in y.
template <int DTYPE, int LINES>
void attend(const float* q, const Cache& k, const Cache& v, const int64_t* table, int64_t head, int64_t context, float* y) {
  const int lines = LINES ? LINES : (int)(k.head_dim / 16);
  F held[LINES ? LINES : 1];
  const auto get = [&](int j) { return LINES ? held[LINES ? j : 0] : load(y + j * 16); };
  const auto put = [&](int j, F x) { LINES ? (void)(held[LINES ? j : 0] = x) : store(y + j * 16, x); };
  for (int j = 0; j < lines; j++) put(j, zero());
  float top = -__builtin_inff(), total = 0;
  for (int64_t start = 0; start < context; start += 16) {
    const int64_t count = context - start < 16 ? context - start : 16;
    const int64_t block = table[start / k.block_size], offset = start % k.block_size;
    alignas(64) float score[16];
    for (int64_t t = 0; t < 16; t++) score[t] = -__builtin_inff();
    for (int64_t t = 0; t < count; t++) {
      const void* key = k.vector(block, head, offset + t);
      F a = zero(), b = zero();  // two chains: a fused multiply-add takes four cycles
      for (int j = 0; j < lines; j++) {
        F& part = j % 2 ? b : a;
        part = fma(cached<DTYPE>(key, j * 16), load(q + j * 16), part);
      }
      score[t] = sum(add(a, b)) * cached_scale<DTYPE>(key, lines * 16);
    }
    const float highest_here = highest(load(score));
    if (highest_here > top) {
      const float shrink = total > 0 ? __builtin_expf(top - highest_here) : 0.0f;
      for (int j = 0; j < lines; j++) put(j, mul(get(j), set1(shrink)));
      total *= shrink, top = highest_here;
    }
    store(score, exp(sub(load(score), set1(top))));
    for (int64_t t = 0; t < count; t++) {
      const void* value = v.vector(block, head, offset + t);
      total += score[t];
      const F weight = set1(score[t] * cached_scale<DTYPE>(value, lines * 16));
      for (int j = 0; j < lines; j++) put(j, fma(cached<DTYPE>(value, j * 16), weight, get(j)));
    }
  }
  for (int j = 0; j < lines; j++) store(y + j * 16, mul(get(j), set1(1.0f / total)));
}

using Attend = void (*)(const float*, const Cache&, const Cache&, const int64_t*, int64_t, int64_t, float*);

// Of the published heads (128), or of any multiple of 16.
template <int DTYPE> Attend attend_for(int64_t dim) { return dim == 128 ? attend<DTYPE, 8> : attend<DTYPE, 0>; }

// q [rows, heads, d]; row i is the last of contexts[i] tokens of the request with block table tables[requests[i]].
// Gives y [rows, heads * d].
// d is a multiple of 16, at most kMostDim; block_size one of 16.
void paged_attention(const void* q, int64_t dtype, int64_t rows, int64_t heads, int64_t dim, const void* k_cache,
                    const void* v_cache, int64_t cache_dtype, int64_t block_size, const int64_t* tables, int64_t table_width,
                    const int64_t* requests, const int64_t* contexts, void* y) {
  const Cache k{(void*)k_cache, cache_dtype, heads, block_size, dim}, v{(void*)v_cache, cache_dtype, heads, block_size, dim};
  const Attend run = cache_dtype == kFloat32    ? attend_for<kFloat32>(dim)
                     : cache_dtype == kBfloat16 ? attend_for<kBfloat16>(dim)
                     : cache_dtype == kFloat16  ? attend_for<kFloat16>(dim)
                                                : attend_for<kInt8>(dim);
  const F scale = set1(1.0f / __builtin_sqrtf((float)dim));
  parallel(rows * heads, [&](int64_t i) {
    float* x = scratch<float>(0, 2 * kMostDim);
    for (int64_t j = 0; j < dim; j += 16) store(x + j, mul(load_as(q, dtype, i * dim + j), scale));
    const int64_t row = i / heads;
    run(x, k, v, tables + requests[row] * table_width, i % heads, contexts[row], x + kMostDim);
    for (int64_t j = 0; j < dim; j += 16) store_as(y, dtype, i * dim + j, load(x + kMostDim + j));
  });
}

}  // namespace
