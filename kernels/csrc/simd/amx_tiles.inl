// AMX tiles: the registers' shape, activations as tiles, packed weights as tiles.
//
// A tile is 16 rows of 64 bytes. Int8: 16 rows x 64 inputs against 64 inputs x 16 outputs, in 16 cycles. Bfloat16: 32
// inputs instead. Weights of 4 and 8 bits, less the midpoint, are integers that both hold exactly. A float16
// activation is exactly the sum of two bfloat16 and a float32 one of three, so that two or three products with the same
// weights lose nothing either, and are still faster than float32 multiply-adds.
#include <immintrin.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t kTileBytes = 1024;
constexpr int64_t kAhead = 1024;  // prefetch distance in the weights, bytes: a group of int4

// Tiles 0 to 3 hold sums, 4 and up activations and weights. Unused rows cost no time.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// In assembly since g++ 12's intrinsic declares to the compiler that it reads eight bytes, not 64.
inline void load_config(const TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }

// Linux grants a process the tile registers on request.
bool amx_granted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Denormals are zeros while it lives, as they are on tiles.
class NoDenormals {
 public:
  explicit NoDenormals(bool on = true) : before(_mm_getcsr()) { if (on) _mm_setcsr(before | 0x8040); }
  ~NoDenormals() { _mm_setcsr(before); }

 private:
  unsigned before;
};

// Activations in strips of 16 rows. In row-major order the rows of a tile would all map to one set of the L1 cache, since
// 4096 inputs are 4 KiB.
struct Tiled {
  int64_t rows, strips, padded, groups;
  uint8_t* tiles;      // [strips][tiles of a strip][planes][16][64]
  float *scale, *sum;  // [groups][strips * 16]; sum is that of a group's activations, in int8 an int32. Int8 only: scale
};

Tiled tiled(int64_t rows, int64_t strips, int64_t padded, int64_t group, int64_t bytes_an_input) {
  Tiled t{rows, strips, padded, padded / group, nullptr, nullptr, nullptr};
  t.tiles = scratch<uint8_t>(4, strips * 16 * padded * bytes_an_input);
  t.scale = scratch<float>(6, 2 * t.groups * strips * 16);
  t.sum = t.scale + t.groups * strips * 16;
  return t;
}

// Products of int8 activations, rounded for each row and group.
struct Int8 {
  static constexpr int kPlanes = 1, kInputs = 64;  // of a tile
  static constexpr bool kScaled = true;

  static Tiled activations(const void* x, int64_t dtype, int64_t rows, int64_t strips, int64_t inputs, const Packed& w,
                           const int32_t* perm) {
    const int64_t padded = w.groups * w.group;
    const Tiled t = tiled(rows, strips, padded, w.group, 1);
    parallel(strips > 1 ? strips * 16 : rows, [&](int64_t m) {
      int8_t* q = scratch<int8_t>(2, padded);
      float* row = scratch<float>(0, padded);
      float* scale = scratch<float>(3, 2 * t.groups);
      int32_t* sum = (int32_t*)scale + t.groups;
      if (m < rows) {
        gather_row(at(x, dtype, m * inputs), dtype, inputs, padded, perm, row);
        for (int64_t g = 0; g < w.groups; g++) round_group(row + g * w.group, w.group, q + g * w.group, scale + g, sum + g);
      } else {
        memset(q, 0, (size_t)padded), memset(scale, 0, (size_t)t.groups * 8);
      }
      uint8_t* to = t.tiles + m / 16 * 16 * padded + m % 16 * 64;
      for (int64_t k = 0; k < padded; k += 64, to += kTileBytes) memcpy(to, q + k, 64);
      for (int64_t g = 0; g < t.groups; g++) {
        t.scale[g * strips * 16 + m] = scale[g];
        ((int32_t*)t.sum)[g * strips * 16 + m] = sum[g];
      }
    });
    return t;
  }

  // Converts `lines` of one block to tiles and subtracts the midpoint.
  template <int BITS> static void unpack(const uint8_t* line, int64_t lines, uint8_t* to) {
    for (const uint8_t* end = line + lines * 64; line < end; line += 64) {
      const Bytes both = load_bytes(line);
      _mm_prefetch((const char*)line + kAhead, _MM_HINT_T0);
      if (BITS == 8) {
        store_bytes(to, _mm512_xor_si512(both, _mm512_set1_epi8((char)0x80))), to += 64;
      } else {
        const Bytes middle = _mm512_set1_epi8(8);
        store_bytes(to, _mm512_sub_epi8(low_nibbles(both), middle));
        store_bytes(to + 64, _mm512_sub_epi8(low_high_nibbles(both), middle)), to += 128;
      }
    }
  }
};

// The same of float activations as PLANES bfloat16 numbers each. In every eight inputs the order is 0 2 4 6 1 3 5 7,
// which is how pairs come out of a line of nibbles; bytes keep theirs.
template <int PLANES> struct Bfloat16 {
  static constexpr int kPlanes = PLANES, kInputs = 32;
  static constexpr bool kScaled = false;

  static Tiled activations(const void* x, int64_t dtype, int64_t rows, int64_t strips, int64_t inputs, const Packed& w,
                           const int32_t* perm) {
    const int64_t padded = w.groups * w.group;
    const Tiled t = tiled(rows, strips, padded, w.group, 2 * PLANES);
    const I natural = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const I order = w.bits == 8 ? natural : _mm512_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    parallel(strips > 1 ? strips * 16 : rows, [&](int64_t m) {
      float* row = scratch<float>(0, padded);
      if (m < rows) gather_row(at(x, dtype, m * inputs), dtype, inputs, padded, perm, row);
      else memset(row, 0, (size_t)padded * 4);
      uint8_t* strip = t.tiles + m / 16 * 32 * padded * PLANES + m % 16 * 64;
      for (int64_t g = 0; g < w.groups; g++) {
        F total = zero();
        for (int64_t k = g * w.group; k < (g + 1) * w.group; k += 16) {
          const F value = load(row + k);
          total = add(total, value);
          split(_mm512_permutexvar_ps(order, value), strip + k / 32 * PLANES * kTileBytes + k % 32 * 2);
        }
        t.sum[g * strips * 16 + m] = sum(total);
      }
    });
    return t;
  }

  // Each plane holds the upper half of the remainder: eight bits of the fraction. Truncated, not rounded, so that the
  // largest numbers stay finite. The remainder of infinity is zero, for which a subtraction would return NaN.
  static F upper(F value) { return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32((int)0xffff0000))); }
  static F rest(F value) {
    const F high = upper(value);
    return _mm512_maskz_sub_ps(_mm512_cmp_ps_mask(value, high, _CMP_NEQ_OQ), value, high);
  }
  static void split(F value, uint8_t* to) {
    for (int p = 0; p < PLANES; p++, to += kTileBytes, value = rest(value))
      _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(value), 16)));
  }

  template <int BITS> static void unpack(const uint8_t* line, int64_t lines, uint8_t* to) {
    for (const uint8_t* end = line + lines * 64; line < end; line += 64) {
      const Bytes both = load_bytes(line);
      _mm_prefetch((const char*)line + kAhead, _MM_HINT_T0);
      if (BITS == 8) {
        for (int i = 0; i < 2; i++, to += 64) store((float*)to, byte_pairs_less_128(both, 16 * i));
      } else {
QVL_UNROLL
        for (int i = 0; i < 4; i++, to += 64) store((float*)to, nibble_pairs_less_8(both, 4 * i));
      }
    }
  }
};

}  // namespace
