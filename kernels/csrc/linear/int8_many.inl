// Packed weights times many rows of int8 activations: tiles of M rows x NB blocks, whose sums are in registers.

namespace {

constexpr int64_t kTileRowsAtOnce = 528;  // whose activations are in a cache while panels of weights pass by

#if defined(QVL_OWN_PANELS)
constexpr bool kCopiesBytes = true;  // whether 8-bit blocks, too, are copied to a panel, in the order of its products

template <int BITS> void unpack_block(const Packed& w, int64_t block, uint8_t* to) {
  const uint8_t* line = w.lines + block * w.block_bytes();
  unpack_lines<BITS>(line, line + w.block_bytes(), to);
}
#else
constexpr bool kCopiesBytes = false;

// A block as unsigned bytes, [padded / 4][64]; 8-bit blocks are stored so.
template <int BITS> void unpack_block(const Packed& w, int64_t block, uint8_t* to) {
  static_assert(BITS == 4, "8-bit blocks are used as they are");
  const uint8_t* line = w.lines + block * w.block_bytes();
  for (const uint8_t* end = line + w.block_bytes(); line < end; line += 64, to += 128) {
    const Bytes both = load_bytes(line);
    __builtin_prefetch(line + kLinesAhead);
    store_bytes(to, low_nibbles(both)), store_bytes(to + 64, low_high_nibbles(both));
  }
}
#endif

// A tile against NB blocks of bytes, `across` apart.
template <int BITS, int M, int NB>
void tile_of_rows(const Packed& w, const Activations& a, const Output& out, const uint8_t* panel, int64_t across, int64_t tile,
                  int64_t block) {
  const int8_t* x = a.q + tile * M * a.padded;
  alignas(64) float acc[M][NB][16];
  memset(acc, 0, sizeof acc);
  for (int64_t g = 0; g < w.groups; g++, panel += w.group * 16, x += w.group * M) {
    const GroupSums<M, NB> group{w, a, tile, block, g};
    I sums[M][NB];
    group.start(sums);
    unpacked_lines<BITS == 4, M, NB>(sums, panel, across, x, w.group / 4);
    group.finish(sums, [&](int m, int n, F sum, F factor) { store(acc[m][n], fma(sum, factor, load(acc[m][n]))); });
  }
  put_tile<NB>(a, out, tile, block, acc[0][0]);
}

template <int BITS, int M, int NB>
void panel_of_blocks(const Packed& w, const Activations& a, const Output& out, int64_t block) {
  const int64_t bytes = w.groups * w.group * 16;
  const uint8_t* panel = w.lines + block * w.block_bytes();
  if constexpr (BITS == 4 || kCopiesBytes) {
    uint8_t* unpacked = scratch<uint8_t>(5, NB * bytes);
    for (int n = 0; n < NB; n++) unpack_block<BITS>(w, block + n, unpacked + n * bytes);
    panel = unpacked;
  }
  for (int64_t tile = 0; tile < a.tiles; tile++) tile_of_rows<BITS, M, NB>(w, a, out, panel, bytes, tile, block);
}

template <int BITS, int M> void many_rows(const Packed& w, const Activations& a, const Output& out) {
  constexpr int NB = kTileBlocks;
  parallel((w.blocks() + NB - 1) / NB, [&](int64_t i) {
    if (i * NB + NB <= w.blocks()) return panel_of_blocks<BITS, M, NB>(w, a, out, i * NB);
    for (int64_t block = i * NB; block < w.blocks(); block++) panel_of_blocks<BITS, M, 1>(w, a, out, block);
  });
}

}  // namespace
