// Shared by all attention kernels: the rows of a job, and the online softmax of a row over several passes.

namespace {

// Rows of queries, or of a result, with strides in elements.
struct Rows {
  void* data;
  int64_t dtype, per_row, per_head;
  void* vector(int64_t row, int64_t head) const { return at(data, dtype, row * per_row + head * per_head); }
};

struct Job {
  Rows q, y;
  Cache k, v;
  const int64_t* table;
  int64_t head, heads, dim;      // heads of this job, from `head` on
  int64_t row, rows;             // and its rows
  int64_t seen, causal;          // keys that the first row attends to, and how many more for each next row: 0 or 1
  int64_t sees(int64_t i) const { return seen + causal * i; }
  // The stored vectors of a token of the request, of the job's first head or of the h-th.
  const void* key(int64_t token, int64_t h = 0) const { return k.vector(table[token / k.block_size], head + h, token % k.block_size); }
  const void* value(int64_t token, int64_t h = 0) const { return v.vector(table[token / v.block_size], head + h, token % v.block_size); }
};

// Keys of a pass. Every kernel begins a pass at a multiple of it, so that a row's weights are the same numbers whichever
// computes them.
constexpr int64_t kKeysAtOnce = 256;

// Multiplies the first `count` numbers by others, such as the scores of int8 keys by the keys' scales.
inline void scale_first(float* x, const float* by, int64_t count) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store(x + i, mul(load(x + i), load(by + i)));
  for (; i < count; i++) x[i] *= by[i];
}

// The state of the online softmax (Milakov and Gimelshein 2018): the highest scaled score of a row, an exponent of 2,
// and the sum of its weights.
struct Softmax {
  float top = -__builtin_inff(), total = 0;

  // Turns the first `count` scores into weights 2^(scale * score - top), and the rest up to `padded` into zeros. Returns
  // the factor for the sums of earlier passes.
  float weigh(float* scores, int64_t count, int64_t padded, float scale) {
    const int64_t whole = (count + 15) / 16 * 16;
    for (int64_t i = count; i < whole; i++) scores[i] = -__builtin_inff();
    for (int64_t i = whole; i < padded; i += 16) store(scores + i, zero());
    if (!count) return 1.0f;
    F most = set1(-__builtin_inff());
    for (int64_t i = 0; i < whole; i += 16) most = max(most, load(scores + i));
    const float before = top, here = highest(most) * scale;
    top = here > before ? here : before;
    const F shift = set1(-top), factor = set1(scale);
    F sums = zero();
    for (int64_t i = 0; i < whole; i += 16) {
      const F weight = exp2(fma(load(scores + i), factor, shift));
      store(scores + i, weight);
      sums = add(sums, weight);
    }
    for (int64_t i = count; i < whole; i++) scores[i] = 0;  // 2^-inf is 2^-126 here: see exp2
    const float shrink = total > 0 ? sum(exp2(set1(before - top))) / 16 : 0.0f;
    total = total * shrink + sum(sums);
    return shrink;
  }
};

}  // namespace
