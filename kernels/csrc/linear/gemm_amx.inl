// Packed weights times activations of five or more rows on AMX tiles, in int8 or bfloat16 products.
//
// A thread takes four blocks of outputs and unpacks some groups of them. Then, for each step of up to two tiles of
// inputs, the weights of two blocks stay in registers while strips of rows pass by. Their sums leave the tiles through
// memory, and are scaled and added up while the next products run.
//
// Few tile registers are in use at a time, and each is rarely written. A loop of products, zeros and stores alone, its
// data in L1, takes 25 ns a product with 2 x 2 tiles and 18 ns as here, in the slower of the two states that the measured
// machine switched between (15 and 10 in the faster). In the whole kernel the difference is below 5 %: scaling the sums
// costs a third of its time.
#include "simd/amx_tiles.inl"

namespace {

constexpr int kPanel = 4;      // blocks whose groups are unpacked together
constexpr int kNear = 4;       // strips whose sums of a panel stay in the L1 cache
constexpr int64_t kWide = 4;       // with more strips: panels that share activations in the L2 cache
constexpr int64_t kFarGroups = 4;  // and groups unpacked at once

// Two blocks x K tiles of inputs, in registers.
template <int K> inline void load_weights(const uint8_t* first, const uint8_t* second) {
  _tile_loadd(4, first, 64);
  _tile_loadd(5, second, 64);
  if constexpr (K == 2) {
    _tile_loadd(6, first + kTileBytes, 64);
    _tile_loadd(7, second + kTileBytes, 64);
  }
}

// sums [2][16][16] of a strip with the weights in registers.
template <class T, int K> inline void products(const uint8_t* rows, void* sums) {
  _tile_zero(0);
  _tile_zero(1);
  for (int p = 0; p < T::kPlanes; p++) {
    _tile_loadd(2, rows + p * kTileBytes, 64);
    if constexpr (T::kScaled) {
      _tile_dpbssd(0, 2, 4);
      _tile_dpbssd(1, 2, 5);
    } else {
      _tile_dpbf16ps(0, 2, 4);
      _tile_dpbf16ps(1, 2, 5);
    }
  }
  for (int p = 0; K == 2 && p < T::kPlanes; p++) {
    _tile_loadd(2, rows + (T::kPlanes + p) * kTileBytes, 64);
    if constexpr (T::kScaled) {
      _tile_dpbssd(0, 2, 6);
      _tile_dpbssd(1, 2, 7);
    } else {
      _tile_dpbf16ps(0, 2, 6);
      _tile_dpbf16ps(1, 2, 7);
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, (char*)sums + kTileBytes, 64);
}

// Sums of a step, to be added to those of all steps, acc [2][16][16].
struct Pending {
  const void* sums;
  float* acc;
  int64_t strip, block, group;
  bool zeros;  // whether to subtract their part: once a group
};

// Zero points are subtracted from an int8 sum as integers, as for few rows: the sums are the same numbers there.
template <class T> inline void add_scaled(const Packed& w, const Tiled& a, const Pending& step) {
  const int64_t rows = a.strips > 1 ? 16 : a.rows, first = (step.group * a.strips + step.strip) * 16;
  // Read once: as far as the compiler knows, a store may change `a`.
  const float *row_scale = a.scale + first, *row_sum = a.sum + first;
  const int32_t middle = 1 << (w.bits - 1);
  for (int n = 0; n < 2; n++) {
    const int64_t block = step.block + n < w.blocks() ? step.block + n : step.block;
    const F scale = w.scale(block, step.group);
    const int32_t* from = (const int32_t*)step.sums + n * 256;
    float* to = step.acc + n * 256;
    const I shift = step.zeros ? isub(iset1(middle), load_u8(w.zeros + (block * w.groups + step.group) * 16)) : iset1(0);
    if constexpr (T::kScaled) {
      if (step.zeros) {
        for (int64_t m = 0; m < rows; m++) {
          const I sum = iadd(_mm512_load_si512(from + m * 16), imul(shift, iset1(((const int32_t*)row_sum)[m])));
          store(to + m * 16, fma(to_float(sum), mul(scale, set1(row_scale[m])), load(to + m * 16)));
        }
        continue;
      }
    }
#pragma GCC unroll 4
    for (int64_t m = 0; m < rows; m++) {
      F factor = scale, value;
      if constexpr (T::kScaled) {
        factor = mul(scale, set1(row_scale[m])), value = to_float(_mm512_load_si512(from + m * 16));
      } else {
        value = load((const float*)from + m * 16);
      }
      store(to + m * 16, fma(value, factor, load(to + m * 16)));
    }
    if (!step.zeros) continue;
    const F scaled = mul(scale, to_float(shift));
    for (int64_t m = 0; m < rows; m++) store(to + m * 16, fma(scaled, set1(row_sum[m]), load(to + m * 16)));
  }
}

// Unpacked groups of a panel.
struct Panel {
  int64_t block, group, groups;
  const uint8_t* tiles[kPanel];
};

template <class T, int BITS> void unpack(const Packed& w, Panel& panel, uint8_t* to) {
  const int64_t bytes = panel.groups * w.group / T::kInputs * kTileBytes;
  for (int n = 0; n < kPanel; n++) {
    panel.tiles[n] = panel.block + n < w.blocks() ? to + n * bytes : panel.tiles[0];
    if (panel.block + n >= w.blocks()) continue;
    const uint8_t* lines = w.lines + (panel.block + n) * w.block_bytes() + panel.group * w.group_bytes();
    T::template unpack<BITS>(lines, panel.groups * w.group_bytes() / 64, to + n * bytes);
  }
}

// Strips [begin, end) times the panel's groups, added to acc [strips][kPanel][16][16].
template <class T, int K>
void add_panel(const Packed& w, const Tiled& a, const Panel& panel, int64_t begin, int64_t end, float* acc) {
  alignas(64) int32_t sums[2][2][16][16];
  const int64_t tiles = a.padded / T::kInputs, steps = w.group / T::kInputs / K;
  Pending last{nullptr, nullptr, 0, 0, 0, false};
  int turn = 0;
  for (int64_t step = 0; step < panel.groups * steps; step++)
    for (int n = 0; n < kPanel && panel.block + n < w.blocks(); n += 2) {
      load_weights<K>(panel.tiles[n] + step * K * kTileBytes, panel.tiles[n + 1] + step * K * kTileBytes);
      for (int64_t s = begin; s < end; s++, turn ^= 1) {
        const int64_t tile = s * tiles + panel.group * steps * K + step * K;
        products<T, K>(a.tiles + tile * T::kPlanes * kTileBytes, sums[turn]);
        if (last.sums) add_scaled<T>(w, a, last);
        const bool due = w.zeros && step % steps == 0;
        last = {sums[turn], acc + (s * kPanel + n) * 256, s, panel.block + n, panel.group + step / steps, due};
      }
    }
  add_scaled<T>(w, a, last);
}

template <class T, int BITS, int K> void multiply(const Packed& w, const Tiled& a, const Output& out) {
  TileConfig config;
  if (a.strips == 1) config.rows[0] = config.rows[1] = config.rows[2] = (uint8_t)a.rows;
  const bool far = a.strips > kNear;
  const int64_t at_once = far ? kFarGroups : 1, wide = far ? kWide : 1, per_panel = a.strips * kPanel * 256;
  parallel_ranges((w.blocks() + kPanel - 1) / kPanel, wide, [&](int64_t begin, int64_t end) {
    load_config(config);
    const NoDenormals here(!T::kScaled);  // as on tiles also in the sums of a step: exact_amx.inl has no other way
    float* acc = scratch<float>(7, wide * per_panel);
    memset(acc, 0, (size_t)((end - begin) * per_panel) * 4);
    uint8_t* tiles = scratch<uint8_t>(5, kPanel * at_once * w.group / T::kInputs * kTileBytes);
    for (int64_t group = 0; group < w.groups; group += at_once)
      for (int64_t p = begin; p < end; p++) {
        Panel panel{p * kPanel, group, w.groups - group < at_once ? w.groups - group : at_once, {}};
        unpack<T, BITS>(w, panel, tiles);
        for (int64_t s = 0; s < a.strips; s += kNear)
          add_panel<T, K>(w, a, panel, s, s + kNear < a.strips ? s + kNear : a.strips, acc + (p - begin) * per_panel);
      }
    _tile_release();
    for (int64_t m = 0; m < a.rows; m++)
      for (int64_t block = begin * kPanel; block < end * kPanel && block < w.blocks(); block++) {
        const float* sums = acc + (block / kPanel - begin) * per_panel + (m / 16 * kPanel + block % kPanel) * 256;
        out.put(m, block * 16, load(sums + m % 16 * 16));
      }
  });
}

constexpr int64_t kRowsOfPanel = 512;  // their activations, some groups at a time, stay in the L2 cache

// x [rows, inputs] of `dtype`, perm as in linear_int8.
template <class T, int BITS>
void linear_amx(const void* x, int64_t dtype, int64_t rows, int64_t inputs, const int32_t* perm, const Packed& w,
                const Output& out) {
  for (int64_t first = 0; first < rows; first += kRowsOfPanel) {
    const int64_t count = rows - first < kRowsOfPanel ? rows - first : kRowsOfPanel;
    const Tiled a = T::activations(at(x, dtype, first * inputs), dtype, count, (count + 15) / 16, inputs, w, perm);
    const Output part{out.bias, at(out.y, out.dtype, first * out.outputs), out.dtype, out.outputs};
    if (w.group % (2 * T::kInputs) == 0) multiply<T, BITS, 2>(w, a, part);
    else multiply<T, BITS, 1>(w, a, part);
  }
}

constexpr int64_t kAmxRows = 5;  // fewest int8 rows for AMX; kernels in registers keep up with memory, in the same order

// False if another kernel is better: few rows, or groups smaller than a tile.
bool linear_int8_amx(const void* x, int64_t dtype, int64_t rows, int64_t inputs, const int32_t* perm, const Packed& w,
                     const Output& out) {
  if (rows < kAmxRows || w.group % Int8::kInputs) return false;
  if (w.bits == 4) linear_amx<Int8, 4>(x, dtype, rows, inputs, perm, w, out);
  else linear_amx<Int8, 8>(x, dtype, rows, inputs, perm, w, out);
  return true;
}

}  // namespace
