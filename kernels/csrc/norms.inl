// RMSNorm, LayerNorm and elementwise ops: one pass over memory, float32 inside.

namespace {

// y = x / sqrt(mean(x^2) + eps), rounded to `dtype`, times weight. With `update`, x + update comes first and is stored
// in `total`: the residual add fused with its norm.
void rms_norm(const void* x, const void* update, int64_t dtype, int64_t rows, int64_t width, const void* weight, double eps,
              void* total, void* y) {
  parallel_ranges(rows, 1 + 16384 / width, [&](int64_t begin, int64_t end) {
    float* row = scratch<float>(0, (width + 15) / 16 * 16);
    for (int64_t m = begin; m < end; m++) {
      F squares = zero();
      for (int64_t i = 0; i < width; i += 16) {
        F v = load_upto(x, dtype, m * width + i, width - i);
        if (update) {
          v = rounded(add(v, load_upto(update, dtype, m * width + i, width - i)), dtype);
          store_upto(total, dtype, m * width + i, v, width - i);
        }
        squares = fma(v, v, squares);
        store(row + i, v);
      }
      const F factor = set1(1.0f / __builtin_sqrtf(sum(squares) / (float)width + (float)eps));
      for (int64_t i = 0; i < width; i += 16) {
        const F v = rounded(mul(load(row + i), factor), dtype);
        store_upto(y, dtype, m * width + i, mul(v, load_upto(weight, dtype, i, width - i)), width - i);
      }
    }
  });
}

// y = (x - mean) / sqrt(variance + eps) * weight + bias
void layer_norm(const void* x, int64_t dtype, int64_t rows, int64_t width, const void* weight, const void* bias, double eps,
                void* y) {
  parallel_ranges(rows, 1 + 16384 / width, [&](int64_t begin, int64_t end) {
    float* row = scratch<float>(0, (width + 15) / 16 * 16);
    for (int64_t m = begin; m < end; m++) {
      F total = zero();
      for (int64_t i = 0; i < width; i += 16) {
        const F v = load_upto(x, dtype, m * width + i, width - i);
        total = add(total, v);
        store(row + i, v);
      }
      const float mean = sum(total) / (float)width;
      float squares = 0;  // of the differences: x^2 - mean^2 would cancel
      int64_t i = 0;
      F sums = zero();
      for (; i + 16 <= width; i += 16) {
        const F d = sub(load(row + i), set1(mean));
        sums = fma(d, d, sums);
      }
      for (; i < width; i++) squares += (row[i] - mean) * (row[i] - mean);
      const float factor = 1.0f / __builtin_sqrtf((sum(sums) + squares) / (float)width + (float)eps);
      for (i = 0; i < width; i += 16) {
        const int64_t n = width - i;
        const F v = mul(sub(load(row + i), set1(mean)), set1(factor));
        store_upto(y, dtype, m * width + i, fma(v, load_upto(weight, dtype, i, n), load_upto(bias, dtype, i, n)), n);
      }
    }
  });
}

constexpr int64_t kElements = 16384;  // a chunk

// x [rows, 2 * width] holds up | gate; y [rows, width] = up * silu(gate), silu(x) = x / (1 + e^-x), which is rounded to
// `dtype` as a separate op would round it
void swiglu(const void* x, int64_t dtype, int64_t rows, int64_t width, void* y) {
  parallel_ranges(rows * width, kElements, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t up = i / width * width + i, part = width - i % width < end - i ? width - i % width : end - i;
      for (int64_t j = 0; j < part; j += 16) {
        const F g = load_upto(x, dtype, up + width + j, part - j);
        const F silu = rounded(div(g, add(set1(1.0f), exp(sub(zero(), g)))), dtype);
        store_upto(y, dtype, i + j, mul(load_upto(x, dtype, up + j, part - j), silu), part - j);
      }
      i += part;
    }
  });
}

// GELU: x * Phi(x). The dtype is a template argument, since a branch for each line cost a tenth of the time.
template <int DTYPE> void gelu_of(const void* x, int64_t count, void* y) {
  const auto of = [](F v) { return mul(mul(v, set1(0.5f)), add(set1(1.0f), erf(mul(v, set1(0.70710678f))))); };
  parallel_ranges(count, kElements, [&](int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + 16 <= end; i += 16) store_as(y, DTYPE, i, of(load_as(x, DTYPE, i)));
    if (i < end) store_part(y, DTYPE, i, of(load_part(x, DTYPE, i, end - i)), end - i);
  });
}

void gelu(const void* x, int64_t dtype, int64_t count, void* y) {
  if (dtype == kFloat32) gelu_of<kFloat32>(x, count, y);
  else if (dtype == kBfloat16) gelu_of<kBfloat16>(x, count, y);
  else gelu_of<kFloat16>(x, count, y);
}

}  // namespace
