// Attention of one or two query rows, for decoding: memory-bound; the cache is read once, in place.
//
// A block of a head is a run of a few KiB, too short for the hardware prefetcher: reading head after head reaches 17 GB/s
// of memory's 25. So a job reads up to eight heads together, a few tokens of each in turn, like a GEMV of eight streams,
// and prefetches the next block's vectors in the same order.

namespace {

constexpr int64_t kMostDim = 256, kMostHeads = 8;
constexpr int64_t kTogether = 2;  // values that are added in one pass over the sums

// Up to 16 cached tokens of a head, vectors `row` bytes apart, and the 16 that are read after them.
struct Sixteen {
  const char *keys, *values, *next_keys;
  int64_t row, count;
};

// Prefetches `count` vectors from the t-th on of a run, or of the run after it.
inline void prefetch(const char* run, const char* after, int64_t t, int64_t count, int64_t row) {
  const char* vectors = t < 16 ? run + t * row : after + (t - 16) * row;
  for (int64_t i = 0; i < count * row; i += 64) __builtin_prefetch(vectors + i);
}

// 16 channels of a cached vector from channel i; int8 without its scale.
template <int DTYPE> inline F cached(const void* vector, int64_t i) {
  return DTYPE == kInt8 ? to_float(load_i8((const int8_t*)vector + i)) : load_as(vector, DTYPE, i);
}
template <int DTYPE> inline float cached_scale(const void* vector, int64_t dim) {
  float scale = 1.0f;
  if (DTYPE == kInt8) memcpy(&scale, (const int8_t*)vector + dim, 4);
  return scale;
}

// A vector held as its lines of 16 channels: LINES of them in registers, or any number in memory where LINES is 0.
// bfloat16 in registers is held as even and odd channels of each 32, as `load_bf16_pairs` returns them.
template <int DTYPE, int LINES> struct Lines {
  static constexpr bool kPairs = DTYPE == kBfloat16 && LINES > 0 && LINES % 2 == 0;

  template <class Use> static inline void each(const void* vector, int lines, const Use& use) {
    if (kPairs) {
QVL_UNROLL
      for (int j = 0; j < LINES; j += 2) {
        F even, odd;
        load_bf16_pairs((const uint16_t*)vector + j * 16, even, odd);
        use(j, even), use(j + 1, odd);
      }
    } else {
QVL_UNROLL
      for (int j = 0; j < (LINES ? LINES : lines); j++) use(j, cached<DTYPE>(vector, j * 16));
    }
  }

  // Converts between channels in order and the order of `each`.
  static void reorder(float* x, int lines, bool forth) {
    float plain[32];
    for (int j = 0; kPairs && j < lines; j += 2, x += 32) {
      memcpy(plain, x, sizeof plain);
      for (int i = 0; i < 16; i++)
        for (int odd = 0; odd < 2; odd++) forth ? x[16 * odd + i] = plain[2 * i + odd] : x[2 * i + odd] = plain[16 * odd + i];
    }
  }
};

// The state of one query row of a head while it reads the cache.
template <int DTYPE, int LINES> class DecodedRow {
 public:
  // query: float [dim]
  void begin(const float* query, int64_t dim) {
    dim_ = dim, lines_ = LINES ? LINES : (int)(dim / 16), softmax_ = Softmax();
    memcpy(q_, query, (size_t)dim * 4);
    Vector::reorder(q_, lines_, true);
    for (int j = 0; j < lines_; j++) store(held_ + j * 16, zero());
  }

  // Query times key, still to be summed over its lanes.
  F product(const char* key) const {
    F a = zero(), b = zero();  // two chains: a fused multiply-add takes four cycles
    Vector::each(key, lines_, [&](int j, F x) { j % 2 ? b = fma(x, load(q_ + j * 16), b) : a = fma(x, load(q_ + j * 16), a); });
    return add(a, b);
  }

  // Turns the scores of 16 keys into the weights of their values.
  void weigh(const Sixteen& s, const F* products) {
    store(weights_, row_sums(products));
    for (int64_t t = 0; DTYPE == kInt8 && t < s.count; t++) weights_[t] *= cached_scale<DTYPE>(s.keys + t * s.row, dim_);
    const float shrink = softmax_.weigh(weights_, s.count, 16, 1.44269504f / __builtin_sqrtf((float)dim_));
    for (int64_t t = 0; DTYPE == kInt8 && t < s.count; t++) weights_[t] *= cached_scale<DTYPE>(s.values + t * s.row, dim_);
    if (shrink == 1.0f) return;
    for (int j = 0; j < lines_; j++) store(held_ + j * 16, mul(load(held_ + j * 16), set1(shrink)));
  }

  // Adds the values of tokens t to t + kTogether, as far as they exist.
  void add_values(const Sixteen& s, int64_t t) {
    const char *one = s.values + t * s.row, *other = one + s.row;
    const F first = set1(weights_[t]), second = set1(weights_[t + 1]);
    if (t + 1 == s.count) return Vector::each(one, lines_, [&](int j, F x) { add_to(j, mul(x, first)); });
    F lines[kLines];
    Vector::each(one, lines_, [&](int j, F x) { lines[j] = fma(x, first, load(held_ + j * 16)); });
    Vector::each(other, lines_, [&](int j, F x) { store(held_ + j * 16, fma(x, second, lines[j])); });
  }

  // y: float [dim]
  void end(float* y) const {
    for (int j = 0; j < lines_; j++) store(y + j * 16, mul(load(held_ + j * 16), set1(1.0f / softmax_.total)));
    Vector::reorder(y, lines_, false);
  }

 private:
  using Vector = Lines<DTYPE, LINES>;
  static constexpr int kLines = LINES ? LINES : kMostDim / 16;

  void add_to(int j, F x) { store(held_ + j * 16, add(load(held_ + j * 16), x)); }

  alignas(64) float q_[kLines * 16];
  alignas(64) float held_[kLines * 16];
  alignas(64) float weights_[16];
  Softmax softmax_;
  int64_t dim_;
  int lines_;
};

// 16 tokens of some heads; row r of head h is state[h * rows + r], and attends to counts[r] of the tokens.
template <int DTYPE, int LINES>
void meet(DecodedRow<DTYPE, LINES>* state, const Sixteen* sixteen, int64_t heads, const int64_t* counts, int64_t rows) {
  const int64_t ahead = DTYPE == kInt8 || heads < 4 ? 16 : 4;  // tokens: few heads, and vectors of 132 bytes, want more
  F products[2 * kMostHeads][16];
  for (int64_t t = 0; t < 16; t++)
    for (int64_t h = 0; h < heads; h++) {
      const Sixteen& s = sixteen[h];
      prefetch(s.keys, s.values, t + ahead, 1, s.row);
      for (int64_t i = h * rows; i < (h + 1) * rows; i++)
        products[i][t] = t < s.count ? state[i].product(s.keys + t * s.row) : zero();
    }
  for (int64_t h = 0; h < heads; h++)
    for (int64_t r = 0; r < rows; r++) {
      Sixteen s = sixteen[h];
      s.count = counts[r];
      if (s.count > 0) state[h * rows + r].weigh(s, products[h * rows + r]);
    }
  for (int64_t t = 0; t < 16; t += kTogether)
    for (int64_t h = 0; h < heads; h++) {
      Sixteen s = sixteen[h];
      prefetch(s.values, s.next_keys, t + ahead, kTogether, s.row);
      for (int64_t r = 0; r < rows; r++) {
        s.count = counts[r];
        if (t < s.count) state[h * rows + r].add_values(s, t);
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
  const auto vectors = [&](const Cache& cache, int64_t start, int64_t head) {
    return (const char*)cache.vector(job.table[start / cache.block_size], head, start % cache.block_size);
  };
  for (int64_t start = 0; start < context; start += 16) {
    const int64_t next = start + 16 < context ? start + 16 : start;
    const auto seen = [&](int64_t r) { return job.sees(r) - start < 16 ? job.sees(r) - start : 16; };
    const int64_t counts[2] = {seen(0), job.rows > 1 ? seen(1) : 0};
    Sixteen sixteen[kMostHeads];
    for (int64_t h = 0, head = job.head; h < job.heads; h++, head++)
      sixteen[h] = {vectors(job.k, start, head), vectors(job.v, start, head), vectors(job.k, next, head),
                    job.k.per_row * size_of(job.k.dtype), seen(job.rows - 1)};
    meet(state, sixteen, job.heads, counts, job.rows);
  }
  for (int64_t i = 0; i < states; i++) {
    state[i].end(x);
    void* y = job.y.vector(job.row + i % job.rows, job.head + i / job.rows);
    for (int64_t j = 0; j < job.dim; j += 16) store_as(y, job.y.dtype, j, load(x + j));
  }
}

}  // namespace
