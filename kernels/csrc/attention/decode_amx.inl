// Attention of one bfloat16 query row for decoding where prefill uses AMX tiles: the same numbers as attention/amx.inl.
//
// Scores: 16 keys are a left-hand tile, from a bfloat16 cache as they are stored, and the query is one column. Each score
// is the same chain of products of 32 channels. Values: a tile's product of 32 keys is defined (Intel's manual, TDPBF16PS)
// as two chains of fused multiply-adds from zero, of even and of odd keys, whose sum is added to the result, denormals
// being zeros. In registers that needs no conversion to tiles; 5 million random products are equal bit by bit.

namespace {

// The state of the query row of a head while it reads a cache of DTYPE, bfloat16 or int8.
template <int DTYPE> class AmxDecodedRow {
 public:
  void begin(const void* query, int64_t dim) {
    dim_ = dim, softmax_ = Softmax();
    memcpy(q_, query, (size_t)dim * 2);
    if (DTYPE == kInt8) interleave_halves(q_, dim);
    for (int64_t i = 0; i < dim; i += 16) store(sums_ + i, zero()), store(even_ + i, zero()), store(odd_ + i, zero());
  }

  // The scores of up to 16 keys from the t-th of the pass on; prefetches what is read next.
  void score(const Sixteen& keys, int64_t t) {
    alignas(64) uint16_t converted[16 * kMostDim];
    const uint16_t* left = (const uint16_t*)keys.vectors;
    int64_t stride = keys.row;
    if (DTYPE == kInt8) {
      left = converted, stride = dim_ * 2;
      for (int64_t i = 0; i < keys.count; i++) {
        const int8_t* key = (const int8_t*)keys.vectors + i * keys.row;
        keys.prefetch(i + 16, 1);
        for (int64_t j = 0; j < dim_; j += 32) _mm512_store_si512(converted + i * dim_ + j, level_pairs(key + j, key + j + 16));
        scales_[t + i] = cached_scale<kInt8>(key, dim_);
      }
    }
    _tile_zero(0);
    for (int64_t j = 0; j < dim_; j += 32) {
      if (DTYPE != kInt8) keys.prefetch(16 + j * 16 / dim_, 512 / dim_);
      _tile_loadd(4, left + j, stride);
      _tile_loadd(6, q_ + j, 4);
      _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, weights_ + t, 4);
  }

  // Turns the scores of the pass into the weights of the values; those of an int8 cache still lack the values' scales.
  void weigh(int64_t count) {
    const int64_t whole = (count + 15) / 16 * 16;
    if (DTYPE == kInt8) scale_first(weights_, scales_, count);
    const float shrink = softmax_.weigh(weights_, count, whole, 1.44269504f / __builtin_sqrtf((float)dim_));
    for (int64_t t = 0; DTYPE != kInt8 && t < whole; t += 16) store(weights_ + t, rounded(load(weights_ + t), kBfloat16));
    for (int64_t i = 0; shrink != 1.0f && i < dim_; i += 16) store(sums_ + i, mul(load(sums_ + i), set1(shrink)));
  }

  // Before values of an int8 cache, from the t-th of the pass on, are added.
  void scale_values(const Sixteen& values, int64_t t) {
    if (DTYPE != kInt8) return;
    alignas(64) float scales[16] = {0};
    for (int64_t i = 0; i < values.count; i++) scales[i] = cached_scale<kInt8>(values.vectors + i * values.row, dim_);
    store(weights_ + t, rounded(mul(load(weights_ + t), load(scales)), kBfloat16));
  }

  // Adds two values from the i-th of 16 on, as far as they exist; the 16 are those from t on in the pass.
  void add_values(const Sixteen& values, int64_t t, int64_t i) {
    add_value(values.vectors + i * values.row, weights_[t + i], even_);
    if (i + 1 < values.count) add_value(values.vectors + (i + 1) * values.row, weights_[t + i + 1], odd_);
  }

  // After 32 values, or the last.
  void add_chains() {
    for (int64_t i = 0; i < dim_; i += 16) {
      store(sums_ + i, add(load(sums_ + i), add(load(even_ + i), load(odd_ + i))));
      store(even_ + i, zero()), store(odd_ + i, zero());
    }
  }

  void end(void* y) {
    const F part = set1(1.0f / softmax_.total);
    if (DTYPE == kBfloat16) in_order(sums_, dim_);
    for (int64_t i = 0; i < dim_; i += 16) store_as(y, kBfloat16, i, mul(load(sums_ + i), part));
  }

 private:
  void add_value(const char* value, float weight, float* chain) const {
    const F factor = set1(weight);
    for (int64_t i = 0; DTYPE == kInt8 && i < dim_; i += 16) store(chain + i, fma(cached<DTYPE>(value, i), factor, load(chain + i)));
    for (int64_t i = 0; DTYPE != kInt8 && i < dim_; i += 32) {
      F even, odd;
      load_bf16_pairs((const uint16_t*)value + i, even, odd);
      store(chain + i, fma(even, factor, load(chain + i))), store(chain + i + 16, fma(odd, factor, load(chain + i + 16)));
    }
  }

  // Channels as `load_bf16_pairs` returns them.
  static void in_order(float* x, int64_t dim) {
    float mixed[32];
    for (const float* end = x + dim; x < end; x += 32) {
      memcpy(mixed, x, sizeof mixed);
      for (int i = 0; i < 32; i++) x[i] = mixed[i / 2 + i % 2 * 16];
    }
  }

  alignas(64) float weights_[kKeysAtOnce];  // scores, then weights, of a pass
  alignas(64) float scales_[kKeysAtOnce];   // of its int8 keys
  alignas(64) float sums_[kMostDim], even_[kMostDim], odd_[kMostDim];
  alignas(64) uint16_t q_[kMostDim];
  Softmax softmax_;
  int64_t dim_;
};

template <int DTYPE> void meet_amx(AmxDecodedRow<DTYPE>* state, const Pass& pass) {
  const int64_t heads = pass.job.heads, ahead = DTYPE == kInt8 || heads < 4 ? 16 : 4;  // as in decode.inl
  Sixteen runs[kMostHeads];
  for (int64_t t = 0; t < pass.count; t += 16) {
    pass.keys(t, runs);
    for (int64_t h = 0; h < heads; h++) state[h].score(runs[h], t);
  }
  for (int64_t h = 0; h < heads; h++) state[h].weigh(pass.count);
  const NoDenormals here;
  for (int64_t t = 0; t < pass.count; t += 16) {
    pass.values(t, runs);
    for (int64_t h = 0; h < heads; h++) state[h].scale_values(runs[h], t);
    for (int64_t i = 0; i < 16; i += kTogether)
      for (int64_t h = 0; h < heads; h++) {
        runs[h].prefetch(i + ahead, kTogether);
        if (i < runs[h].count) state[h].add_values(runs[h], t, i);
      }
    for (int64_t h = 0; (t % 32 || t + 16 >= pass.count) && h < heads; h++) state[h].add_chains();
  }
}

bool covered_by_amx_decoding(const Job& job) { return job.dim % 32 == 0 && (job.k.dtype == kBfloat16 || job.k.dtype == kInt8); }

// The one row of a job.
template <int DTYPE> void attend_amx(const Job& job) {
  const int64_t context = job.sees(0);
  auto* state = scratch<AmxDecodedRow<DTYPE>>(0, job.heads);
  TileConfig config;
  for (int tile : {0, 6}) config.row_bytes[tile] = 4;  // the scores of 16 keys, and 32 channels of the query
  load_config(config);
  for (int64_t h = 0; h < job.heads; h++) state[h].begin(job.q.vector(job.row, job.head + h), job.dim);
  for (int64_t first = 0; first < context; first += kKeysAtOnce)
    meet_amx(state, Pass{job, first, context - first < kKeysAtOnce ? context - first : kKeysAtOnce, context, false});
  for (int64_t h = 0; h < job.heads; h++) state[h].end(job.y.vector(job.row, job.head + h));
  _tile_release();
}

}  // namespace
