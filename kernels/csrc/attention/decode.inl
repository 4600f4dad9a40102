// Attention of one or two query rows in float32, for decoding: memory-bound; the cache is read once, in place.
//
// A block of a head is a run of a few KiB, too short for the hardware prefetcher: reading head after head reaches 17 GB/s
// of memory's 25. So a job reads four or eight heads together, a few tokens of each in turn, like a GEMV of eight streams,
// and prefetches the next block's vectors in the same order.

namespace {

constexpr int64_t kMostDim = 256, kMostHeads = 8;
constexpr int64_t kTogether = 2;  // values that are added in one pass over the sums

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
    each(key, [&](int j, F x) { sum = fma(x, load(q_ + j * 16), sum); });
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

  // Adds kTogether of the values from the i-th of 16 on, as far as they exist; the 16 are those from t on in the pass.
  void add_values(const Sixteen& values, int64_t t, int64_t i) {
    const char *one = values.vectors + i * values.row, *other = one + values.row;
    const F first = set1(weights_[t + i] * cached_scale<DTYPE>(one, dim_));
    if (i + 1 == values.count) return each(one, [&](int j, F x) { store(held_ + j * 16, fma(x, first, load(held_ + j * 16))); });
    const F second = set1(weights_[t + i + 1] * cached_scale<DTYPE>(other, dim_));
    F sums[kLines];
    each(one, [&](int j, F x) { sums[j] = fma(x, first, load(held_ + j * 16)); });
    each(other, [&](int j, F x) { store(held_ + j * 16, fma(x, second, sums[j])); });
  }

  // y: float [dim]
  void end(float* y) const {
    for (int j = 0; j < lines_; j++) store(y + j * 16, mul(load(held_ + j * 16), set1(1.0f / softmax_.total)));
    reorder_channels(y, DTYPE, dim_, false);
  }

 private:
  static constexpr int kLines = LINES ? LINES : kMostDim / 16;

  template <class Use> void each(const void* vector, const Use& use) const {
    if (in_pairs(DTYPE, LINES ? LINES * 16 : dim_)) {
QVL_UNROLL_SUMS
      for (int j = 0; j < (LINES ? LINES : lines_); j += 2) {
        F even, odd;
        load_bf16_pairs((const uint16_t*)vector + j * 16, even, odd);
        use(j, even), use(j + 1, odd);
      }
    } else {
QVL_UNROLL_SUMS
      for (int j = 0; j < (LINES ? LINES : lines_); j++) use(j, cached<DTYPE>(vector, j * 16));
    }
  }

  alignas(64) float q_[kLines * 16];
  alignas(64) float held_[kLines * 16];
  alignas(64) float weights_[kKeysAtOnce];  // scores, then weights, of a pass
  Softmax softmax_;
  int64_t dim_;
  int lines_;
};

// The runs of a pass in the order in which they are read: keys, then values, 16 of each head in turn.
struct Pass {
  const Job& job;
  int64_t first, count, context;
  Sixteen keys(int64_t t, int64_t h) const {
    const void* after = t + 16 < count ? job.key(first + t + 16, h) : job.value(first, h);
    return {(const char*)job.key(first + t, h), (const char*)after, row(), count - t < 16 ? count - t : 16};
  }
  Sixteen values(int64_t t, int64_t h) const {
    const int64_t next = first + kKeysAtOnce;
    const void* after = t + 16 < count ? job.value(first + t + 16, h) : job.key(next < context ? next : first, h);
    return {(const char*)job.value(first + t, h), (const char*)after, row(), count - t < 16 ? count - t : 16};
  }
  int64_t row() const { return job.k.per_row * size_of(job.k.dtype); }
};

// One pass; row r of head h is state[h * rows + r], and attends to counts[r] of its tokens.
template <int DTYPE, int LINES> void meet(DecodedRow<DTYPE, LINES>* state, const Pass& pass, const int64_t* counts) {
  const int64_t heads = pass.job.heads, rows = pass.job.rows;
  const int64_t ahead = DTYPE == kInt8 || heads < 4 ? 16 : 4;  // tokens: few heads, and vectors of 132 bytes, want more
  Sixteen runs[kMostHeads];
  F products[2 * kMostHeads][16];
  for (int64_t t = 0; t < pass.count; t += 16) {
    for (int64_t h = 0; h < heads; h++) runs[h] = pass.keys(t, h);
    for (int64_t i = 0; i < 16; i++)
      for (int64_t h = 0; h < heads; h++) {
        runs[h].prefetch(i + ahead, 1);
        for (int64_t s = h * rows; s < (h + 1) * rows; s++)
          products[s][i] = i < runs[h].count ? state[s].product(runs[h].vectors + i * runs[h].row) : zero();
      }
    for (int64_t s = 0; s < heads * rows; s++) state[s].put_scores(runs[s / rows], t, products[s]);
  }
  for (int64_t s = 0; s < heads * rows; s++)
    if (counts[s % rows] > 0) state[s].weigh(counts[s % rows]);
  for (int64_t t = 0; t < pass.count; t += 16) {
    for (int64_t h = 0; h < heads; h++) runs[h] = pass.values(t, h);
    for (int64_t i = 0; i < 16; i += kTogether)
      for (int64_t h = 0; h < heads; h++) {
        runs[h].prefetch(i + ahead, kTogether);
        for (int64_t r = 0; r < rows; r++) {
          Sixteen values = runs[h];
          values.count = counts[r] - t;
          if (i < values.count) state[h * rows + r].add_values(values, t, i);
        }
      }
  }
}

// The rows of a job, at most two.
template <int DTYPE, int LINES> void attend_together(const Job& job) {
  const int64_t states = job.heads * job.rows, context = job.sees(job.rows - 1);
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
    meet(state, Pass{job, first, here, context}, counts);
  }
  for (int64_t i = 0; i < states; i++) {
    state[i].end(x);
    void* y = job.y.vector(job.row + i % job.rows, job.head + i / job.rows);
    for (int64_t j = 0; j < job.dim; j += 16) store_as(y, job.y.dtype, j, load(x + j));
  }
}

}  // namespace
