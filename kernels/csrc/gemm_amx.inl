// Many rows on AMX tiles: 16 rows x 64 inputs against 64 inputs x 16 outputs, eight times the products of VNNI a cycle.
//
// A line of the packed layout is four inputs of sixteen outputs, which is a row of the tile that TDPBSUD wants: sixteen
// lines, 64 inputs, are a tile as they lie in memory. Groups are 64 or 128 inputs; 32 stay with VNNI.
#include <immintrin.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int kAmxRows = 32;  // 2 x 2 tiles of sums: each tile of rows and of weights is loaded once for two products

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Linux gives a process the tile registers when it asks.
bool amx_granted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Activations as tiles, [rows / 16][padded / 64][16][64]: row after row, the rows of a tile would all fall into one set
// of the L1 cache, since 4096 inputs are 4 KiB.
int8_t* in_tiles(const Activations& a) {
  const int64_t strips = (a.rows + kAmxRows - 1) / kAmxRows * 2;
  int8_t* tiles = scratch<int8_t>(4, strips * 16 * a.padded);
  parallel(strips, [&](int64_t s) {
    int8_t* to = tiles + s * 16 * a.padded;
    for (int64_t k = 0; k < a.padded; k += 64)
      for (int64_t m = 0; m < 16; m++, to += 64) memcpy(to, a.q + (s * 16 + m) * a.padded + k, 64);
  });
  return tiles;
}

// sums [32][2][16] of one group: two strips of 16 rows, two blocks.
inline void group_sums(const int8_t* upper, const int8_t* lower, const uint8_t* first, const uint8_t* second,
                       int64_t group, int32_t (*sums)[2][16]) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < group; k += 64) {
    _tile_loadd(4, upper + k * 16, 64);
    _tile_loadd(5, lower + k * 16, 64);
    _tile_loadd(6, first + k * 16, 64);
    _tile_loadd(7, second + k * 16, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  _tile_stored(0, sums[0][0], sizeof sums[0]);
  _tile_stored(1, sums[0][1], sizeof sums[0]);
  _tile_stored(2, sums[16][0], sizeof sums[0]);
  _tile_stored(3, sums[16][1], sizeof sums[0]);
}

void tile_amx(const Packed& w, int64_t block, const uint8_t* const panels[2], int blocks, const Activations& a,
              const int8_t* tiles, const Output& out, int64_t row) {
  const int8_t *upper = tiles + row * a.padded, *lower = upper + 16 * a.padded;
  alignas(64) int32_t sums[kAmxRows][2][16];
  alignas(64) float acc[kAmxRows][2][16];
  for (int64_t g = 0; g < w.groups; g++) {
    const int64_t k = g * w.group;
    group_sums(upper + k * 16, lower + k * 16, panels[0] + k * 16, panels[1] + k * 16, w.group, sums);
    for (int n = 0; n < blocks; n++) {
      const F scale = w.scale(block + n, g);
      for (int m = 0; m < kAmxRows; m++) {
        const int64_t at = (row + m) * w.groups + g;
        const I total = iadd(_mm512_load_si512(sums[m][n]), w.start(block + n, g, a.sum[at]));
        const F before = g ? load(acc[m][n]) : zero();
        store(acc[m][n], fma(to_float(total), mul(scale, set1(a.scale[at])), before));
      }
    }
  }
  for (int m = 0; m < kAmxRows && row + m < a.rows; m++)
    for (int n = 0; n < blocks; n++) out.put(row + m, (block + n) * 16, load(acc[m][n]));
}

void many_rows_amx(const Packed& w, const Activations& a, const Output& out) {
  const int8_t* tiles = in_tiles(a);
  parallel((w.blocks() + 1) / 2, [&](int64_t pair) {
    static const TileConfig config;
    _tile_loadconfig(&config);
    const uint8_t* panels[2];
    const int blocks = unpack_pair(w, 2 * pair, panels);
    for (int64_t row = 0; row < a.rows; row += kAmxRows) tile_amx(w, 2 * pair, panels, blocks, a, tiles, out, row);
    _tile_release();
  });
}

}  // namespace
