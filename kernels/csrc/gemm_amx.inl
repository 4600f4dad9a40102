// Packed weights times some or many rows on AMX tiles, in int8 or bfloat16 products: five times VNNI's speed.
//
// A thread takes four blocks of outputs, unpacks some groups of them to tiles that stay in its L1 cache, and meets them
// with all strips of rows before it goes on. Sums of a group leave the tiles by memory; while the next group is
// multiplied they are scaled and added up.
#include "amx_tiles.inl"

namespace {

constexpr int kPanel = 4;  // blocks whose groups are unpacked together

// Unpacked groups of a panel, and where the sums of its outputs are kept.
struct Panel {
  int64_t block, first_group, groups;
  const uint8_t* tiles[kPanel];
};

// sums [4][16][16] of one group: STRIPS strips of rows against 4 / STRIPS blocks.
template <class T, int STRIPS>
inline void products(const uint8_t* rows, int64_t strip_bytes, const uint8_t* const* weights, int64_t tiles, void* sums) {
#define QVL_PRODUCT(SUM, ROWS, WEIGHTS) \
  if constexpr (T::kScaled) _tile_dpbssd(SUM, ROWS, WEIGHTS); \
  else _tile_dpbf16ps(SUM, ROWS, WEIGHTS)
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < tiles; k++) {
    const int64_t at_weights = k * kTileBytes, at_rows = at_weights * T::kPlanes;
    if constexpr (STRIPS == 2) {
      _tile_loadd(6, weights[0] + at_weights, 64);
      _tile_loadd(7, weights[1] + at_weights, 64);
      for (int p = 0; p < T::kPlanes; p++) {
        _tile_loadd(4, rows + at_rows + p * kTileBytes, 64);
        QVL_PRODUCT(0, 4, 6);
        QVL_PRODUCT(1, 4, 7);
        _tile_loadd(5, rows + strip_bytes + at_rows + p * kTileBytes, 64);
        QVL_PRODUCT(2, 5, 6);
        QVL_PRODUCT(3, 5, 7);
      }
    } else {
      for (int p = 0; p < T::kPlanes; p++) {
        _tile_loadd(4, rows + at_rows + p * kTileBytes, 64);
        _tile_loadd(5, weights[0] + at_weights, 64);
        QVL_PRODUCT(0, 4, 5);
        _tile_loadd(6, weights[1] + at_weights, 64);
        QVL_PRODUCT(1, 4, 6);
        _tile_loadd(7, weights[2] + at_weights, 64);
        QVL_PRODUCT(2, 4, 7);
        _tile_loadd(5, weights[3] + at_weights, 64);
        QVL_PRODUCT(3, 4, 5);
      }
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, (char*)sums + kTileBytes, 64);
  _tile_stored(2, (char*)sums + 2 * kTileBytes, 64);
  _tile_stored(3, (char*)sums + 3 * kTileBytes, 64);
#undef QVL_PRODUCT
}

// acc [4][16][16] += sums of group g, times the scales; and what zero points other than the middle add.
template <class T, int STRIPS>
inline void add_scaled(const Packed& w, const Tiled& a, int64_t strip, int64_t block, int64_t g, const void* sums, float* acc) {
  for (int n = 0; n < 4 / STRIPS; n++) {
    const int64_t column = block + n < w.blocks() ? block + n : block;
    const F scale = w.scale(column, g);
    for (int s = 0; s < STRIPS; s++) {
      const int64_t first = (strip + s) * 16, count = a.rows - first < 16 ? a.rows - first : 16;
      const int32_t* from = (const int32_t*)sums + (s * 4 / STRIPS + n) * 256;
      const float* row_scale = a.scale + g * a.strips * 16 + first;
      float* to = acc + (s * 4 / STRIPS + n) * 256;
      for (int64_t m = 0; m < count; m++) {
        F factor = scale, sum;
        if constexpr (T::kScaled) {
          factor = mul(scale, set1(row_scale[m])), sum = to_float(_mm512_load_si512(from + m * 16));
        } else {
          sum = load((const float*)from + m * 16);
        }
        store(to + m * 16, fma(sum, factor, load(to + m * 16)));
      }
      if (!w.zeros) continue;
      const F shift = mul(scale, sub(set1((float)(1 << (w.bits - 1))), to_float(load_u8(w.zeros + (column * w.groups + g) * 16))));
      for (int64_t m = 0; m < count; m++)
        store(to + m * 16, fma(shift, set1(a.sum[g * a.strips * 16 + first + m]), load(to + m * 16)));
    }
  }
}

// STRIPS strips against 4 / STRIPS blocks of the panel, from `offset` on: the products of its groups are added to acc.
template <class T, int STRIPS>
void add_panel(const Packed& w, const Tiled& a, const Panel& panel, int64_t strip, int offset, float* acc) {
  const int64_t tiles = w.group / T::kInputs, strip_bytes = a.padded / T::kInputs * T::kPlanes * kTileBytes;
  const uint8_t* rows = a.tiles + strip * strip_bytes + panel.first_group * tiles * T::kPlanes * kTileBytes;
  alignas(64) int32_t sums[2][4][16][16];
  for (int64_t g = 0; g < panel.groups; g++) {
    const uint8_t* weights[4 / STRIPS];
    for (int n = 0; n < 4 / STRIPS; n++) weights[n] = panel.tiles[offset + n] + g * tiles * kTileBytes;
    products<T, STRIPS>(rows + g * tiles * T::kPlanes * kTileBytes, strip_bytes, weights, tiles, sums[g % 2]);
    if (g) add_scaled<T, STRIPS>(w, a, strip, panel.block + offset, panel.first_group + g - 1, sums[(g - 1) % 2], acc);
  }
  const int64_t last = panel.groups - 1;
  add_scaled<T, STRIPS>(w, a, strip, panel.block + offset, panel.first_group + last, sums[last % 2], acc);
}

template <class T, int BITS> void unpack_panel(const Packed& w, Panel& panel, uint8_t* to) {
  const int64_t bytes = panel.groups * w.group / T::kInputs * kTileBytes;
  for (int n = 0; n < kPanel; n++) {
    panel.tiles[n] = panel.block + n < w.blocks() ? to + n * bytes : panel.tiles[0];
    if (panel.block + n >= w.blocks()) continue;
    const uint8_t* lines = w.lines + (panel.block + n) * w.block_bytes() + panel.first_group * w.group_bytes();
    T::template unpack<BITS>(lines, panel.groups * w.group_bytes() / 64, to + n * bytes);
  }
}

// STRIPS: 1 where there is one strip, and 2 otherwise. `at_once` groups are unpacked together.
template <class T, int BITS, int STRIPS> void multiply(const Packed& w, const Tiled& a, const Output& out, int64_t at_once) {
  constexpr int kBlocks = 4 / STRIPS, kParts = kPanel / kBlocks;
  TileConfig config;
  const int64_t last_rows = a.rows - (a.strips - 1) * 16;
  if (a.strips == STRIPS)
    for (int t = 0; t < 6; t++)
      if (STRIPS == 1 ? t < 5 : t == 2 || t == 3 || t == 5) config.rows[t] = (uint8_t)last_rows;
  parallel((w.blocks() + kPanel - 1) / kPanel, [&](int64_t p) {
    load_config(config);
    const int64_t sums = a.strips * kPanel * 256;
    float* acc = scratch<float>(7, sums);
    memset(acc, 0, (size_t)sums * 4);
    uint8_t* tiles = scratch<uint8_t>(5, kPanel * at_once * w.group / T::kInputs * kTileBytes);
    Panel panel{p * kPanel, 0, 0, {}};
    for (; panel.first_group < w.groups; panel.first_group += at_once) {
      const int64_t left = w.groups - panel.first_group;
      panel.groups = left < at_once ? left : at_once;
      unpack_panel<T, BITS>(w, panel, tiles);
      for (int64_t s = 0; s < a.strips; s += STRIPS)
        for (int part = 0; part < kParts; part++)
          if (panel.block + part * kBlocks < w.blocks())
            add_panel<T, STRIPS>(w, a, panel, s, part * kBlocks, acc + (s / STRIPS * kParts + part) * 1024);
    }
    _tile_release();
    for (int64_t m = 0; m < a.rows; m++)
      for (int n = 0; n < kPanel && panel.block + n < w.blocks(); n++) {
        const int64_t tile = (m / 16 / STRIPS * kParts + n / kBlocks) * 4 + m / 16 % STRIPS * kBlocks + n % kBlocks;
        out.put(m, (panel.block + n) * 16, load(acc + tile * 256 + m % 16 * 16));
      }
  });
}

constexpr int64_t kRowsAtOnce = 512;  // their activations stay in the L2 cache, some groups at a time

// x [rows, inputs] of `dtype`, perm as in linear_int8.
template <class T, int BITS>
void linear_amx(const void* x, int64_t dtype, int64_t rows, int64_t inputs, const int32_t* perm, const Packed& w, const Output& out) {
  const int64_t kc = getenv("KC") ? atol(getenv("KC")) : 512;
  for (int64_t first = 0; first < rows; first += kRowsAtOnce) {
    const int64_t count = rows - first < kRowsAtOnce ? rows - first : kRowsAtOnce;
    const int64_t strips = count <= 16 ? 1 : (count + 31) / 32 * 2;
    const Tiled a = T::activations(at(x, dtype, first * inputs), dtype, count, strips, inputs, w, perm);
    const Output part{out.bias, at(out.y, out.dtype, first * out.outputs), out.dtype, out.outputs};
    const int64_t at_once = (count <= 32 ? 128 : kc) / w.group;
    if (strips == 1) multiply<T, BITS, 1>(w, a, part, at_once > 1 ? at_once : 1);
    else multiply<T, BITS, 2>(w, a, part, at_once > 1 ? at_once : 1);
  }
}

}  // namespace
