// Dense weights times any number of rows of activations.
//
//   y[m, n] = sum over k of  x[m, k] * w[n, k]  + bias[n]
//
// A line is 64 bytes of a row that one multiply-add reads. Lane l of a sum holds the products of lane l of each line, in
// order; after kDotLines lines the lanes are added up, and these sums in order. One row, whose weights are read in place,
// and a thousand, whose weights are copied to panels, are the same arithmetic: a row's result depends on no other row.

namespace {

// 16 floats of a row of DTYPE are a line. 32 of bfloat16 are two, the even and the odd ones: two cheap moves.
template <int DTYPE> struct FloatLines {
  static constexpr int kDtype = DTYPE, kLines = DTYPE == kBfloat16 ? 2 : 1, kInputs = 16 * kLines;
  static constexpr bool kAsStored = DTYPE == kFloat32;  // whether a line is read from the weight as it is
  static inline void load(const void* from, F* lines) {
    if constexpr (DTYPE == kBfloat16) load_bf16_pairs((const uint16_t*)from, lines[0], lines[1]);
    else lines[0] = load_as(from, DTYPE, 0);
  }
  // sums [m][n] += line m of x times the line at weight(n).
  template <int M, int N, class At> static inline void add(F (&sums)[M][N], const float* x, const At& weight) {
    fma_lines(sums, x, weight);
  }
};

#if defined(QVL_BF16_PAIRS)
// 32 bfloat16 are a line as they are, a pair in each lane.
struct PairLines {
  static constexpr int kDtype = kBfloat16, kLines = 1, kInputs = 32;
  static constexpr bool kAsStored = true;
  static inline void load(const void* from, F* lines) { lines[0] = ::load((const float*)from); }
  template <int M, int N, class At> static inline void add(F (&sums)[M][N], const float* x, const At& weight) {
    dot_pair_lines(sums, x, weight);
  }
};
#endif

constexpr int64_t kDotLines = 64;        // a tile's activations and some weights fit the L1 cache
constexpr int64_t kDotPanel = 16;        // outputs of a panel
constexpr int64_t kPanelsAtOnce = 8;    // panels that share the activations of a pass from the L2 cache
constexpr int64_t kDotRowsAtOnce = 528;  // a multiple of every kDotRows
constexpr int64_t kDotAhead = 1024;      // prefetch distance in a row of weights, bytes

template <class P> struct Dense {
  const void* weight;
  int64_t inputs, outputs;
  const void* bias;
  int64_t rows;
  void* y;
  const float* x;  // lines [tiles][lines][rows of a tile][16], padded with zeros
  int64_t lines() const { return (inputs + P::kInputs - 1) / P::kInputs * P::kLines; }
  const void* row(int64_t n) const { return at(weight, P::kDtype, (n < outputs ? n : outputs - 1) * inputs); }
  void put(int64_t m, int64_t n, F sums, int64_t most) const {
    const int64_t count = outputs - n < most ? outputs - n : most;
    if (bias) sums = add(sums, load_upto(bias, P::kDtype, n, count));
    store_upto(y, P::kDtype, m * outputs + n, sums, count);
  }
};

// The lines of a row's inputs from unit `from` on, padded with zeros where the row ends, to addresses `step` lines apart.
template <class P> inline void put_lines(const void* row, int64_t inputs, int64_t from, int64_t units, float* to, int64_t step) {
  F lines[P::kLines];
  for (int64_t u = from; u < from + units; u++) {
    const int64_t left = inputs - u * P::kInputs;
    const void* unit = at(row, P::kDtype, u * P::kInputs);
    if (left >= P::kInputs) {
      P::load(unit, lines);
    } else {
      alignas(64) char padded[64] = {0};
      memcpy(padded, unit, (size_t)(left * size_of(P::kDtype)));
      P::load(padded, lines);
    }
    for (int i = 0; i < P::kLines; i++, to += step * 16) store(to, lines[i]);
  }
}

// y [M][stride] = the lanes of sums [M][N], added to y unless this is the first pass.
template <int M, int N> inline void add_lanes(const F (&sums)[M][N], bool first, float* y, int64_t stride) {
QVL_UNROLL
  for (int m = 0; m < M; m++) lane_sums<N>(sums[m], first, y + m * stride);
}

// M rows against N rows of the weight, in place: y [M][N].
template <class P, int M, int N> void dot_in_place(const Dense<P>& d, const float* x, int64_t n, float* y) {
  constexpr int64_t kBytes = P::kInputs * (P::kDtype == kFloat32 ? 4 : 2);
  const int64_t units = d.lines() / P::kLines, whole = d.inputs / P::kInputs;
  const char* from[N];
  for (int r = 0; r < N; r++) from[r] = (const char*)d.row(n + r);
  for (int64_t first = 0; first < units; first += kDotLines / P::kLines) {
    const int64_t end = first + kDotLines / P::kLines < units ? first + kDotLines / P::kLines : units;
    F sums[M][N];
    for (int m = 0; m < M; m++)
      for (int r = 0; r < N; r++) sums[m][r] = zero();
    for (int64_t u = first; u < end; u++) {
QVL_UNROLL
      for (int r = 0; r < N; r++) __builtin_prefetch(from[r] + u * kBytes + kDotAhead);
      if (P::kAsStored && u < whole) {
        P::add(sums, x + u * M * 16, [&](int r) { return (const float*)(from[r] + u * kBytes); });
        continue;
      }
      if constexpr (M == 1 && !P::kAsStored) {
        for (int r = 0; u < whole && r < N; r++) {
          F lines[P::kLines];
          P::load(from[r] + u * kBytes, lines);
          for (int i = 0; i < P::kLines; i++) sums[0][r] = fma(lines[i], load(x + (u * P::kLines + i) * 16), sums[0][r]);
        }
        if (u < whole) continue;
      }
      alignas(64) float lines[P::kLines][N][16];
QVL_UNROLL
      for (int r = 0; r < N; r++) put_lines<P>(from[r], d.inputs, u, 1, lines[0][r], N);
      for (int i = 0; i < P::kLines; i++)
        P::add(sums, x + (u * P::kLines + i) * M * 16, [&](int r) { return (const float*)lines[i][r]; });
    }
    add_lanes<M, N>(sums, first == 0, y, N);
  }
}

// y [kDotRows][stride] of `count` lines of a tile of rows and of kDotOutputs outputs, added to y unless they are the first.
template <class P> void dot_panels(const float* x, const float* w, int64_t count, bool first, float* y, int64_t stride) {
  F sums[kDotRows][kDotOutputs];
QVL_UNROLL
  for (int m = 0; m < kDotRows; m++)
    for (int r = 0; r < kDotOutputs; r++) sums[m][r] = zero();
  for (int64_t k = 0; k < count; k++) P::add(sums, x + k * kDotRows * 16, [=](int r) { return w + (k * kDotOutputs + r) * 16; });
  add_lanes<kDotRows, kDotOutputs>(sums, first, y, stride);
}

// Panels [begin, end) of outputs against all rows.
template <class P> void many_dots(const Dense<P>& d, int64_t begin, int64_t end) {
  const int64_t tiles = (d.rows + kDotRows - 1) / kDotRows, wide = (end - begin) * kDotPanel, all = d.lines();
  float* weights = scratch<float>(5, wide * kDotLines * 16);
  float* sums = scratch<float>(7, tiles * kDotRows * wide);  // [rows][wide]
  for (int64_t first = 0; first < all; first += kDotLines) {
    const int64_t count = all - first < kDotLines ? all - first : kDotLines, group = count * kDotOutputs * 16;
    for (int64_t r = 0; r < wide; r++)
      put_lines<P>(d.row(begin * kDotPanel + r), d.inputs, first / P::kLines, count / P::kLines,
                   weights + r / kDotOutputs * group + r % kDotOutputs * 16, kDotOutputs);
    for (int64_t t = 0; t < tiles; t++) {
      float* y = sums + t * kDotRows * wide;
      for (int64_t r = 0; r < wide; r += kDotOutputs)
        dot_panels<P>(d.x + (t * all + first) * kDotRows * 16, weights + r / kDotOutputs * group, count, first == 0, y + r, wide);
      for (int64_t m = 0; first + count == all && m < kDotRows && t * kDotRows + m < d.rows; m++)
        for (int64_t r = 0; r < wide && begin * kDotPanel + r < d.outputs; r += 16)
          d.put(t * kDotRows + m, begin * kDotPanel + r, load(y + m * wide + r), 16);
    }
  }
}

// The activations in tiles of M rows.
template <class P> const float* dot_tiles(const Dense<P>& d, const void* x, int64_t M) {
  const int64_t tiles = (d.rows + M - 1) / M, all = d.lines();
  float* to = scratch<float>(4, tiles * all * M * 16);
  parallel_ranges(tiles * M, d.rows <= kDotRows ? tiles * M : M, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) {
      float* lines = to + (m / M * all * M + m % M) * 16;
      if (m < d.rows) put_lines<P>(at(x, P::kDtype, m * d.inputs), d.inputs, 0, all / P::kLines, lines, M);
      else
        for (int64_t k = 0; k < all; k++) store(lines + k * M * 16, zero());
    }
  });
  return to;
}

// Few rows, M at a time: the weights come from memory for the first of them, and from the L2 cache for the rest.
template <class P, int M, int N> void few_dots(Dense<P> d, const void* x) {
  d.x = dot_tiles(d, x, M);
  const int64_t per_chunk = 1 + (128 << 10) / (N * d.inputs * size_of(P::kDtype));
  parallel_ranges((d.outputs + N - 1) / N, per_chunk, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * N; n < end * N; n += N) {
      alignas(64) float y[M * N + 16];
      for (int64_t first = 0; first < d.rows; first += M) {
        dot_in_place<P, M, N>(d, d.x + first * d.lines() * 16, n, y);
        for (int64_t m = 0; m < M && first + m < d.rows; m++) d.put(first + m, n, load(y + m * N), N);
      }
    }
  });
}

// Rows of the smaller tiles, where a whole one is much more.
constexpr int kTwo = kDotRows > 4 ? 2 : kDotRows, kFour = kDotRows > 4 ? 4 : kDotRows;

template <class P>
void dense(const void* x, int64_t rows, int64_t inputs, const void* weight, int64_t outputs, const void* bias, void* y) {
  for (int64_t first = 0; first < rows; first += kDotRowsAtOnce) {
    const int64_t count = rows - first < kDotRowsAtOnce ? rows - first : kDotRowsAtOnce;
    Dense<P> d{weight, inputs, outputs, bias, count, at(y, P::kDtype, first * outputs), nullptr};
    const void* from = at(x, P::kDtype, first * inputs);
    if (count == 1) few_dots<P, 1, kDotStreams>(d, from);
    else if (count <= kTwo) few_dots<P, kTwo, kDotOutputs>(d, from);
    else if (count <= kFour) few_dots<P, kFour, kDotOutputs>(d, from);
    else if (count <= 2 * kDotRows) few_dots<P, kDotRows, kDotOutputs>(d, from);
    else {
      d.x = dot_tiles(d, from, kDotRows);
      const int64_t panels = (outputs + kDotPanel - 1) / kDotPanel, each = panels / (4 * qvl_threads());
      parallel_ranges(panels, each < 1 ? 1 : each < kPanelsAtOnce ? each : kPanelsAtOnce,
                      [&](int64_t begin, int64_t end) { many_dots(d, begin, end); });
    }
  }
}

// x [rows, inputs] times weight [outputs, inputs] transposed, plus bias unless it is null; all of one dtype.
void linear_dense(const void* x, int64_t dtype, int64_t rows, int64_t inputs, const void* weight, int64_t outputs,
                  const void* bias, void* y) {
  if (dtype == kFloat32) return dense<FloatLines<kFloat32>>(x, rows, inputs, weight, outputs, bias, y);
  if (dtype == kFloat16) return dense<FloatLines<kFloat16>>(x, rows, inputs, weight, outputs, bias, y);
#if defined(__AMX_BF16__)
  linear_dense_amx((const uint16_t*)x, rows, inputs, (const uint16_t*)weight, outputs, bias, (uint16_t*)y);
#else
#if defined(QVL_BF16_PAIRS)
  if (has_bf16_pairs()) return dense<PairLines>(x, rows, inputs, weight, outputs, bias, y);
#endif
  dense<FloatLines<kBfloat16>>(x, rows, inputs, weight, outputs, bias, y);
#endif
}

}  // namespace
