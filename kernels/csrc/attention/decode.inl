// Attention of one or two query rows in float32, for decoding: memory-bound; the cache is read once, in place.
//
// A block of a head is a run of a few KiB, too short for the hardware prefetcher: one head through all of its context, then
// the next, reaches 17 GB/s of memory's 25. So a job reads up to eight heads together, which are contiguous in a block, and
// prefetches what follows in the same order. A few tokens of each head in turn are like a GEMV of eight streams; but heads
// of 16 tokens of 128 16-bit channels are 4 KiB apart, in the same set of an L1 cache, and eight would take all of eight
// ways. There, heads are read one after another in each block: faster by a tenth, and over an int8 cache, whose runs are
// half as long, by a half (on Zen 3; on an Intel Xeon with twelve ways heads in turn are faster).

namespace {

constexpr int64_t kMostDim = 256, kMostHeads = 8;
constexpr int64_t kTogether = 2;  // values of a head that are added in one pass over the sums, heads in turn
constexpr int64_t kMostTogether = 4;  // and one head after another

// Up to 16 cached keys or values of a head, `row` bytes apart, and the 16 vectors that are read after them.
struct Sixteen {
  const char *vectors, *after;
  int64_t row, count;
  // Prefetches `count` vectors from the t-th on, or of those after.
  void prefetch(int64_t t, int64_t count) const {
    const char* from = t < 16 ? vectors + t * row : after + (t - 16) * row;
    for (int64_t i = 0; i < count * row; i += 64) __builtin_prefetch(from + i);
  }
};

// 16 channels of a cached vector from channel i; int8 without its scale.
template <int DTYPE> inline F cached(const void* vector, int64_t i) {
  return DTYPE == kInt8 ? to_float(load_i8((const int8_t*)vector + i)) : load_as(vector, DTYPE, i);
}
template <int DTYPE> inline float cached_scale(const void* vector, int64_t dim) {
  float scale = 1.0f;
  if (DTYPE == kInt8) memcpy(&scale, (const int8_t*)vector + dim, 4);
  return scale;
}

// Whether the kernels hold vectors of a cache as the even and the odd channels of each 32, as `load_bf16_pairs` returns
// them. It decides which products of a score meet in a lane, so all kernels must agree.
constexpr bool in_pairs(int64_t dtype, int64_t dim) { return dtype == kBfloat16 && (dim == 64 || dim == 128); }

// Converts a vector between channels in order and the order in which a cache's are held.
inline void reorder_channels(float* x, int64_t dtype, int64_t dim, bool forth) {
  if (!in_pairs(dtype, dim)) return;
  float plain[32];
  for (const float* end = x + dim; x < end; x += 32) {
    memcpy(plain, x, sizeof plain);
    for (int i = 0; i < 16; i++)
      for (int odd = 0; odd < 2; odd++) forth ? x[16 * odd + i] = plain[2 * i + odd] : x[2 * i + odd] = plain[16 * odd + i];
  }
}

// The state of one query row of a head while it reads the cache: vectors of LINES lines of 16 channels in registers, or of
// any number in memory where LINES is 0.
template <int DTYPE, int LINES> class DecodedRow {
 public:
  // query: float [dim]
  void begin(const float* query, int64_t dim) {
    dim_ = dim, lines_ = LINES ? LINES : (int)(dim / 16), softmax_ = Softmax();
    memcpy(q_, query, (size_t)dim * 4);
    reorder_channels(q_, DTYPE, dim, true);
    for (int j = 0; j < lines_; j++) store(held_ + j * 16, zero());
  }

  // Query times key, still to be summed over its lanes.
  F product(const char* key) const {
    F sum = zero();
    if (in_pairs(DTYPE, LINES ? LINES * 16 : dim_)) {
QVL_UNROLL_SUMS
      for (int j = 0; j < (LINES ? LINES : lines_); j += 2) {
        F even, odd;
        load_bf16_pairs((const uint16_t*)key + j * 16, even, odd);
        sum = fma(odd, load(q_ + j * 16 + 16), fma(even, load(q_ + j * 16), sum));
      }
    } else {
QVL_UNROLL_SUMS
      for (int j = 0; j < (LINES ? LINES : lines_); j++) sum = fma(cached<DTYPE>(key, j * 16), load(q_ + j * 16), sum);
    }
    return sum;
  }

  // Keeps the scores of 16 keys from the t-th of the pass on.
  void put_scores(const Sixteen& keys, int64_t t, const F* products) {
    store(weights_ + t, row_sums(products));
    for (int64_t i = 0; DTYPE == kInt8 && i < keys.count; i++) weights_[t + i] *= cached_scale<DTYPE>(keys.vectors + i * keys.row, dim_);
  }

  // Turns the first `count` scores of the pass into the weights of the values.
  void weigh(int64_t count) {
    const float shrink = softmax_.weigh(weights_, count, (count + 15) / 16 * 16, 1.44269504f / __builtin_sqrtf((float)dim_));
    if (shrink == 1.0f) return;
    for (int j = 0; j < lines_; j++) store(held_ + j * 16, mul(load(held_ + j * 16), set1(shrink)));
  }

  // Adds N of the values from the i-th of 16 on, as far as they exist; the 16 are those from t on in the pass.
  template <int N> void add_values(const Sixteen& values, int64_t t, int64_t i) {
    if (i + N <= values.count) return add_all<N>(values, t, i);
    for (; i < values.count; i++) add_all<1>(values, t, i);
  }

  // y: float [dim]
  void end(float* y) const {
    for (int j = 0; j < lines_; j++) store(y + j * 16, mul(load(held_ + j * 16), set1(1.0f / softmax_.total)));
    reorder_channels(y, DTYPE, dim_, false);
  }

 private:
  static constexpr int kLines = LINES ? LINES : kMostDim / 16;

  template <int N> void add_all(const Sixteen& values, int64_t t, int64_t i) {
    const char* from = values.vectors + i * values.row;
    F weight[N];
    for (int n = 0; n < N; n++) weight[n] = set1(weights_[t + i + n] * cached_scale<DTYPE>(from + n * values.row, dim_));
    if (in_pairs(DTYPE, LINES ? LINES * 16 : dim_)) {
QVL_UNROLL_SUMS
      for (int j = 0; j < (LINES ? LINES : lines_); j += 2) {
        F even = load(held_ + j * 16), odd = load(held_ + j * 16 + 16);
        for (int n = 0; n < N; n++) {
          F x, y;
          load_bf16_pairs((const uint16_t*)(from + n * values.row) + j * 16, x, y);
          even = fma(x, weight[n], even), odd = fma(y, weight[n], odd);
        }
        store(held_ + j * 16, even), store(held_ + j * 16 + 16, odd);
      }
    } else {
QVL_UNROLL_SUMS
      for (int j = 0; j < (LINES ? LINES : lines_); j++) {
        F sum = load(held_ + j * 16);
        for (int n = 0; n < N; n++) sum = fma(cached<DTYPE>(from + n * values.row, j * 16), weight[n], sum);
        store(held_ + j * 16, sum);
      }
    }
  }

  alignas(64) float q_[kLines * 16];
  alignas(64) float held_[kLines * 16];
  alignas(64) float weights_[kKeysAtOnce];  // scores, then weights, of a pass
  Softmax softmax_;
  int64_t dim_;
  int lines_;
};

// Whether heads are read one after another in each block, instead of a few tokens of each in turn.
inline bool heads_apart() { return qvl_cache_ways() > 0 && qvl_cache_ways() <= kMostHeads; }

// A pass over the tokens of a job from `first` on: keys, then values, 16 tokens of each head at a time.
struct Pass {
  const Job& job;
  int64_t first, count, context;
  bool apart;  // see heads_apart
  // The runs of all heads from the t-th token of the pass on.
  void keys(int64_t t, Sixteen* runs) const {
    cut(job.key(first + t), t + 16 < count ? job.key(first + t + 16) : job.value(first), t, runs);
  }
  void values(int64_t t, Sixteen* runs) const {
    const int64_t next = first + kKeysAtOnce;
    cut(job.value(first + t), t + 16 < count ? job.value(first + t + 16) : job.key(next < context ? next : first), t, runs);
  }

 private:
  void cut(const void* here, const void* next, int64_t t, Sixteen* runs) const {
    const int64_t size = size_of(job.k.dtype), head = job.k.per_head * size;
    const char *now = (const char*)here, *then = (const char*)next;
    for (int64_t h = 0; h < job.heads; h++) {
      const char* after = !apart ? then + h * head : h + 1 < job.heads ? now + (h + 1) * head : then;
      runs[h] = {now + h * head, after, job.k.per_row * size, count - t < 16 ? count - t : 16};
    }
  }
};

// One pass; row r of head h is state[h * rows + r], and attends to counts[r] of its tokens. TURN heads take turns, or all
// where TURN is 0, N values at a time.
template <int DTYPE, int LINES, int TURN, int N> void meet(DecodedRow<DTYPE, LINES>* state, const Pass& pass, const int64_t* counts) {
  const int64_t heads = pass.job.heads, rows = pass.job.rows, turn = TURN ? TURN : heads;
  const int64_t ahead = TURN || DTYPE == kInt8 || heads < 4 ? 16 : 4;  // tokens: few heads, and vectors of 132 bytes, want more
  Sixteen runs[kMostHeads];
  F products[2 * kMostHeads][16];
  for (int64_t t = 0; t < pass.count; t += 16) {
    pass.keys(t, runs);
    for (int64_t from = 0; from < heads; from += turn)
      for (int64_t i = 0; i < 16; i++)
        for (int64_t h = from; h < from + turn; h++) {
          runs[h].prefetch(i + ahead, 1);
          for (int64_t s = h * rows; s < (h + 1) * rows; s++)
            products[s][i] = i < runs[h].count ? state[s].product(runs[h].vectors + i * runs[h].row) : zero();
        }
    for (int64_t s = 0; s < heads * rows; s++) state[s].put_scores(runs[s / rows], t, products[s]);
  }
  for (int64_t s = 0; s < heads * rows; s++)
    if (counts[s % rows] > 0) state[s].weigh(counts[s % rows]);
  for (int64_t t = 0; t < pass.count; t += 16) {
    pass.values(t, runs);
    for (int64_t from = 0; from < heads; from += turn)
      for (int64_t i = 0; i < 16; i += N)
        for (int64_t h = from; h < from + turn; h++) {
          runs[h].prefetch(i + ahead, N);
          for (int64_t r = 0; r < rows; r++) {
            Sixteen values = runs[h];
            values.count = counts[r] - t;
            if (i < values.count) state[h * rows + r].template add_values<N>(values, t, i);
          }
        }
  }
}

// The rows of a job, at most two.
template <int DTYPE, int LINES> void attend_together(const Job& job) {
  const int64_t states = job.heads * job.rows, context = job.sees(job.rows - 1);
  const bool apart = heads_apart();
  auto* state = scratch<DecodedRow<DTYPE, LINES>>(0, states);
  alignas(64) float x[kMostDim];
  for (int64_t i = 0; i < states; i++) {
    const void* q = job.q.vector(job.row + i % job.rows, job.head + i / job.rows);
    for (int64_t j = 0; j < job.dim; j += 16) store(x + j, load_as(q, job.q.dtype, j));
    state[i].begin(x, job.dim);
  }
  for (int64_t first = 0; first < context; first += kKeysAtOnce) {
    const int64_t here = context - first < kKeysAtOnce ? context - first : kKeysAtOnce;
    const auto seen = [&](int64_t r) { return job.sees(r) - first < here ? job.sees(r) - first : here; };
    const int64_t counts[2] = {seen(0), job.rows > 1 ? seen(1) : 0};
    const Pass pass{job, first, here, context, apart};
    apart ? meet<DTYPE, LINES, 1, kMostTogether>(state, pass, counts) : meet<DTYPE, LINES, 0, kTogether>(state, pass, counts);
  }
  for (int64_t i = 0; i < states; i++) {
    state[i].end(x);
    void* y = job.y.vector(job.row + i % job.rows, job.head + i / job.rows);
    for (int64_t j = 0; j < job.dim; j += 16) store_as(y, job.y.dtype, j, load(x + j));
  }
}

}  // namespace
