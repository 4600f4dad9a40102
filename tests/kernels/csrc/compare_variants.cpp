// Compares each instruction set's kernels with the portable ones, whose results the Python tests compare with torch. It
// needs neither Python nor torch, so that an emulator can run it: compare_variants LIBRARY [INSTRUCTION_SET, or "none"].
// Prints a line for each instruction set and kernel; fails if a result differs by more than float32 sums in another order may,
// or if a row of a linear or of causal attention has other bits alone than among others.
#include <dlfcn.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

namespace {

enum Dtype : int64_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kInt8 = 3 };
const Dtype kFloats[] = {kFloat32, kBfloat16, kFloat16};

using Bytes = std::vector<uint8_t>;

uint32_t g_state = 1;
uint32_t next_random() { return g_state = g_state * 1664525u + 1013904223u, g_state >> 8; }
float uniform() { return (float)next_random() / (1 << 24) * 2 - 1; }

size_t size_of(int64_t dtype) { return dtype == kFloat32 ? 4 : dtype == kInt8 ? 1 : 2; }

uint16_t half_of(float x) {  // normal numbers only, cut off
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const int32_t exponent = (int32_t)(bits >> 23 & 255) - 112;
  return exponent < 1 ? 0 : (uint16_t)((bits >> 16 & 0x8000) | (uint32_t)exponent << 10 | (bits >> 13 & 1023));
}
float float_of(uint16_t half) {
  const float size = ldexpf((float)((half >> 10 & 31 ? 1024 : 0) + (half & 1023)), (half >> 10 & 31 ? half >> 10 & 31 : 1) - 25);
  return half & 0x8000 ? -size : size;
}

void put(Bytes& to, int64_t dtype, size_t i, float x) {
  const uint16_t half = half_of(x);
  if (dtype == kFloat32) memcpy(&to[i * 4], &x, 4);
  if (dtype == kBfloat16) memcpy(&to[i * 2], (const char*)&x + 2, 2);
  if (dtype == kFloat16) memcpy(&to[i * 2], &half, 2);
}
float get(const Bytes& from, int64_t dtype, size_t i) {
  float x = 0;
  uint16_t half;
  if (dtype == kFloat32) return memcpy(&x, &from[i * 4], 4), x;
  if (dtype == kInt8) return (float)(int8_t)from[i];
  memcpy(&half, &from[i * 2], 2);
  if (dtype == kFloat16) return float_of(half);
  memcpy((char*)&x + 2, &half, 2);
  return x;
}

Bytes floats(int64_t dtype, size_t count, float size = 1, float middle = 0) {
  Bytes made(count * size_of(dtype));
  for (size_t i = 0; i < count; i++) put(made, dtype, i, middle + size * uniform());
  return made;
}
Bytes random_bytes(size_t count) {
  Bytes made(count);
  for (uint8_t& byte : made) byte = (uint8_t)next_random();
  return made;
}

void* g_library;
int g_failures = 0;

// One kernel of two instruction sets, and the largest difference of their results so far.
struct Pair {
  std::string isa, name;
  void *ours, *portable;
  double worst = 0;
  int cases = 0;

  Pair(const std::string& isa, const char* name) : isa(isa), name(name) {
    auto find = (void* (*)(const char*, const char*, const char**))dlsym(g_library, "qvl_kernel");
    ours = find(isa.c_str(), name, nullptr), portable = find("portable", name, nullptr);
    if (!ours || !portable) printf("no kernel %s for %s\n", name, isa.c_str()), exit(2);
  }
  ~Pair() { printf("%s %s: %d cases, largest difference %.1e of what is allowed\n", isa.c_str(), name.c_str(), cases, worst); }

  // A row computed alone has the bits that it has as a row among others.
  void same_bits(const Bytes& alone, const Bytes& others, int64_t row, const char* what) {
    cases++;
    if (!memcmp(alone.data(), &others[(size_t)row * alone.size()], alone.size())) return;
    printf("FAILED: %s %s, %s: row %d has other bits alone\n", isa.c_str(), name.c_str(), what, (int)row), g_failures++;
  }

  // The difference as a part of the largest number, in roundings of the dtype.
  void compare(const Bytes& a, const Bytes& b, int64_t dtype, double roundings, const char* what) {
    double largest = 1e-30, difference = 0;
    for (size_t i = 0; i < a.size() / size_of(dtype); i++) {
      const double x = get(a, dtype, i), y = get(b, dtype, i);
      largest = fmax(largest, fabs(y));
      if (!(fabs(x - y) <= difference)) difference = x == y || (x != x && y != y) ? difference : fabs(x - y);
      if ((x != x) != (y != y)) difference = INFINITY;
    }
    const double rounding = dtype == kFloat32 ? 0x1p-23 : dtype == kBfloat16 ? 0x1p-7 : dtype == kFloat16 ? 0x1p-10 : 0x1p-7;
    const double allowed = largest * rounding * roundings, part = difference > 0 ? difference / allowed : 0;
    worst = fmax(worst, part), cases++;
    if (!(part <= 1)) printf("FAILED: %s %s, %s: %.3g of %.3g\n", isa.c_str(), name.c_str(), what, difference, largest), g_failures++;
  }
};

std::string text(const char* format, int64_t a, int64_t b = 0, int64_t c = 0, int64_t d = 0) {
  char line[200];
  snprintf(line, sizeof line, format, (long long)a, (long long)b, (long long)c, (long long)d);
  return line;
}

typedef void Linear(const void*, int64_t, int64_t, int64_t, int64_t, const int32_t*, const uint8_t*, const uint16_t*, const uint8_t*,
                    int64_t, int64_t, int64_t, const float*, void*);

void packed_linears(const std::string& isa, const char* name) {
  Pair pair(isa, name);
  for (int64_t bits : {4, 8})
    for (int64_t group : {32, 64, 128})
      for (int64_t rows : {1, 2, 3, 4, 5, 8, 9, 13, 40})
        for (Dtype dtype : kFloats) {
          const int64_t inputs = 384, outputs = rows % 2 ? 16 * 7 - 3 : 16 * 9, blocks = (outputs + 15) / 16, groups = inputs / group;
          const Bytes x = floats(dtype, (size_t)(rows * inputs)), bias = floats(kFloat32, (size_t)outputs);
          const Bytes lines = random_bytes((size_t)(blocks * 16 * inputs * bits / 8)), zeros = random_bytes((size_t)(blocks * groups * 16));
          const Bytes scales = floats(kFloat16, (size_t)(blocks * groups * 16), 0.02f, 0.05f);
          const auto result = [&](void* kernel, int64_t first, int64_t count) {
            Bytes y((size_t)(count * outputs) * size_of(dtype));
            ((Linear*)kernel)(&x[(size_t)(first * inputs) * size_of(dtype)], dtype, count, inputs, inputs, nullptr, lines.data(),
                              (const uint16_t*)scales.data(), group == 64 ? nullptr : zeros.data(), bits, group, outputs,
                              (const float*)bias.data(), y.data());
            return y;
          };
          const Bytes y = result(pair.ours, 0, rows);
          const std::string what = text("%lld bits, group %lld, %lld rows, dtype %lld", bits, group, rows, dtype);
          pair.compare(y, result(pair.portable, 0, rows), dtype, dtype == kFloat32 ? 16 : 1, what.c_str());
          for (int64_t row : {rows / 2, rows - 1}) pair.same_bits(result(pair.ours, row, 1), y, row, what.c_str());
        }
}

typedef void Dequantize(const uint8_t*, const uint16_t*, const uint8_t*, int64_t, int64_t, int64_t, int64_t, int64_t, const int32_t*,
                        int64_t, int64_t, int64_t, void*);

void dequantize(const std::string& isa) {
  Pair pair(isa, "dequantize");
  for (int64_t bits : {4, 8})
    for (Dtype dtype : kFloats) {
      const Bytes lines = random_bytes((size_t)(32 * 128 * bits / 8)), zeros = random_bytes(32 * 4), scales = floats(kFloat16, 32 * 4, 0.02f, 0.05f);
      Bytes y[2];
      for (int i = 0; i < 2; i++) {
        y[i].resize(128 * 32 * size_of(dtype));
        ((Dequantize*)(i ? pair.portable : pair.ours))(lines.data(), (const uint16_t*)scales.data(), bits == 4 ? nullptr : zeros.data(),
                                                       bits, 32, 32, 128, 128, nullptr, 0, 32, dtype, y[i].data());
      }
      pair.compare(y[0], y[1], dtype, 1, text("%lld bits, dtype %lld", bits, dtype).c_str());
    }
}

typedef void DenseLinear(const void*, int64_t, int64_t, int64_t, const void*, int64_t, const void*, void*);

void dense_linears(const std::string& isa) {
  Pair pair(isa, "linear_dense");
  const int64_t shapes[][2] = {{37, 130}, {1, 7}, {48, 1100}, {130, 256}};
  for (const auto& shape : shapes)
    for (int64_t rows : {1, 2, 4, 5, 17, 40})
      for (Dtype dtype : kFloats) {
        const Bytes x = floats(dtype, (size_t)(rows * shape[1])), w = floats(dtype, (size_t)(shape[0] * shape[1])), bias = floats(dtype, (size_t)shape[0]);
        const auto result = [&](void* kernel, int64_t first, int64_t count) {
          Bytes y((size_t)(count * shape[0]) * size_of(dtype));
          ((DenseLinear*)kernel)(&x[(size_t)(first * shape[1]) * size_of(dtype)], dtype, count, shape[1], w.data(), shape[0], bias.data(), y.data());
          return y;
        };
        const Bytes y = result(pair.ours, 0, rows);
        const std::string what = text("%lld x %lld x %lld, dtype %lld", rows, shape[1], shape[0], dtype);
        pair.compare(y, result(pair.portable, 0, rows), dtype, dtype == kFloat32 ? 16 : 2, what.c_str());
        for (int64_t row : {rows / 2, rows - 1}) pair.same_bits(result(pair.ours, row, 1), y, row, what.c_str());
      }
}

typedef void RmsNorm(const void*, const void*, int64_t, int64_t, int64_t, const void*, double, void*, void*);
typedef void LayerNorm(const void*, int64_t, int64_t, int64_t, const void*, const void*, double, void*);
typedef void Swiglu(const void*, int64_t, int64_t, int64_t, void*);
typedef void Gelu(const void*, int64_t, int64_t, void*);

void by_element(const std::string& isa) {
  Pair rms(isa, "rms_norm"), layer(isa, "layer_norm"), swiglu(isa, "swiglu"), gelu(isa, "gelu");
  for (int64_t width : {1, 16, 255, 257, 4096})
    for (Dtype dtype : kFloats) {
      const int64_t rows = 3;
      const size_t count = (size_t)(rows * width);
      const Bytes x = floats(dtype, 2 * count, 4), update = floats(dtype, count), weight = floats(dtype, (size_t)width), bias = floats(dtype, (size_t)width);
      Bytes y[2][5];
      for (int i = 0; i < 2; i++) {
        for (Bytes& one : y[i]) one.resize(count * size_of(dtype));
        ((RmsNorm*)(i ? rms.portable : rms.ours))(x.data(), update.data(), dtype, rows, width, weight.data(), 1e-6, y[i][0].data(), y[i][1].data());
        ((LayerNorm*)(i ? layer.portable : layer.ours))(x.data(), dtype, rows, width, weight.data(), bias.data(), 1e-6, y[i][2].data());
        ((Swiglu*)(i ? swiglu.portable : swiglu.ours))(x.data(), dtype, rows, width, y[i][3].data());
        ((Gelu*)(i ? gelu.portable : gelu.ours))(x.data(), dtype, (int64_t)count, y[i][4].data());
      }
      Pair* pairs[] = {&rms, &rms, &layer, &swiglu, &gelu};
      for (int k = 0; k < 5; k++) pairs[k]->compare(y[0][k], y[1][k], dtype, dtype == kFloat32 ? 16 : 2, text("width %lld, dtype %lld", width, dtype).c_str());
    }
}

typedef void Greedy(const void*, int64_t, int64_t, int64_t, int64_t*, float*);
typedef void ReadMemory(const uint8_t*, int64_t, int32_t*);

void greedy_and_memory(const std::string& isa) {
  Pair greedy(isa, "greedy"), memory(isa, "read_memory");
  for (int64_t width : {1, 17, 1025, 5000})
    for (Dtype dtype : kFloats) {
      Bytes x = floats(dtype, (size_t)(4 * width), 4, -30);
      for (int64_t i = width / 2; i < width; i++) put(x, dtype, (size_t)i, -20);  // the first of several that are equal
      put(x, dtype, (size_t)(width + width / 2), NAN);
      Bytes tokens[2], logprobs[2];
      for (int i = 0; i < 2; i++) {
        tokens[i].resize(4 * 8), logprobs[i].resize(4 * 4);
        ((Greedy*)(i ? greedy.portable : greedy.ours))(x.data(), dtype, 4, width, (int64_t*)tokens[i].data(), (float*)logprobs[i].data());
      }
      greedy.compare(tokens[0], tokens[1], kInt8, 0, text("tokens of width %lld, dtype %lld", width, dtype).c_str());
      greedy.compare(logprobs[0], logprobs[1], kFloat32, 16, text("width %lld, dtype %lld", width, dtype).c_str());
    }
  const Bytes x = random_bytes((3 << 20) + 64 * 5);
  int32_t totals[2];
  for (int i = 0; i < 2; i++) ((ReadMemory*)(i ? memory.portable : memory.ours))(x.data(), (int64_t)x.size(), &totals[i]);
  memory.compare(Bytes((uint8_t*)&totals[0], (uint8_t*)&totals[1]), Bytes((uint8_t*)&totals[1], (uint8_t*)(totals + 2)), kInt8, 0, "bytes");
}

typedef void RotaryToCache(const void*, int64_t, int64_t, int64_t, int64_t, const float*, const float*, int64_t, const float*,
                           const int64_t*, void*, void*, int64_t, int64_t, int64_t, void*);
typedef void Attention(const void*, int64_t, int64_t, int64_t, int64_t, int64_t, const void*, const void*, int64_t, int64_t, int64_t,
                       int64_t, int64_t, int64_t, const int64_t*, int64_t, int64_t, const int64_t*, const int64_t*, int64_t, void*);

// Requests of 1, 2 and 40 new rows over a cache that rotary_to_cache has filled with 300 tokens.
void rotary_and_attention(const std::string& isa) {
  Pair rotary(isa, "rotary_to_cache"), attention(isa, "attention");
  const int64_t kBlock = 16, kTokens = 304, kHeads = 3;
  for (int64_t dim : {48, 64, 104, 128})
    for (Dtype dtype : kFloats)
      for (int64_t cache_dtype : {(int64_t)dtype, (int64_t)kInt8}) {
        const int64_t width = dim + (cache_dtype == kInt8 ? 4 : 0), blocks = kTokens / kBlock;
        const Bytes qkv = floats(dtype, (size_t)(kTokens * 3 * kHeads * dim), 2), cosines = floats(kFloat32, (size_t)(kTokens * dim)), sines = floats(kFloat32, (size_t)(kTokens * dim));
        const Bytes logn = floats(kFloat32, (size_t)kTokens, 0.5f, 1.5f);
        std::vector<int64_t> slots, tables;
        for (int64_t i = 0; i < kTokens; i++) slots.push_back(i);
        for (int r = 0; r < 3; r++)
          for (int64_t i = 0; i < blocks; i++) tables.push_back(i);
        const int64_t starts[] = {0, 1, 3, 43}, contexts[] = {kTokens, 259, 300};
        Bytes q[2], k[2], v[2];
        for (int i = 0; i < 2; i++) {
          q[i].resize((size_t)(kTokens * kHeads * dim) * size_of(dtype));
          k[i].resize((size_t)(kTokens * kHeads * width) * size_of(cache_dtype)), v[i].resize(k[i].size());
          ((RotaryToCache*)(i ? rotary.portable : rotary.ours))(
              qkv.data(), dtype, kTokens, kHeads, dim, (const float*)cosines.data(), (const float*)sines.data(), dim,
              (const float*)logn.data(), slots.data(), k[i].data(), v[i].data(), cache_dtype, blocks, kBlock, q[i].data());
        }
        const std::string what = text("dim %lld, dtype %lld, cache %lld", dim, dtype, cache_dtype);
        rotary.compare(q[0], q[1], dtype, dtype == kFloat32 ? 16 : 1, what.c_str());
        if (cache_dtype != kInt8) rotary.compare(k[0], k[1], dtype, dtype == kFloat32 ? 16 : 1, what.c_str());
        for (int64_t causal : {1, 0}) {
          const auto result = [&](void* kernel, int64_t first, int64_t requests, const int64_t* begins, const int64_t* lengths) {
            Bytes y((size_t)(begins[requests] * kHeads * dim) * size_of(dtype));
            ((Attention*)kernel)(&q[1][(size_t)(first * kHeads * dim) * size_of(dtype)], dtype, kHeads * dim, dim, kHeads, dim,
                                 k[1].data(), v[1].data(), cache_dtype, blocks, kBlock, kHeads * kBlock * width, kBlock * width, width,
                                 tables.data(), blocks, requests, begins, lengths, causal, y.data());
            return y;
          };
          const Bytes y = result(attention.ours, 0, 3, starts, contexts);
          const std::string how = what + (causal ? ", causal" : "");
          attention.compare(y, result(attention.portable, 0, 3, starts, contexts), dtype, dtype == kFloat32 ? 32 : 2, how.c_str());
          for (int64_t row = 3; causal && row < 43; row += 13) {  // of the request of 40, decoded: it sees no later tokens
            const int64_t seen = 300 - 42 + row;
            attention.same_bits(result(attention.ours, row, 1, starts, &seen), y, row, how.c_str());
          }
        }
      }
}

}  // namespace

int main(int count, char** arguments) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  g_library = count > 1 ? dlopen(arguments[1], RTLD_NOW) : nullptr;
  if (!g_library) return printf("usage: %s LIBRARY: %s\n", arguments[0], count > 1 ? dlerror() : "none is named"), 2;
  const std::string all = ((const char* (*)())dlsym(g_library, "qvl_instruction_sets"))();
  printf("instruction sets: %s\n", all.c_str());
  ((void (*)(int64_t))dlsym(g_library, "qvl_set_threads"))(2);
  for (size_t begin = 0, end; (end = all.find(' ', begin)) != std::string::npos; begin = end + 1) {
    const std::string isa = all.substr(begin, end - begin);
    if (count > 2 && isa != arguments[2]) continue;
    packed_linears(isa, "linear_int8"), packed_linears(isa, "linear_exact");
    dequantize(isa), dense_linears(isa), by_element(isa), greedy_and_memory(isa), rotary_and_attention(isa);
  }
  if (count < 3 || strcmp(arguments[2], "none")) printf("%d failures\n", g_failures);
  return g_failures != 0;
}
