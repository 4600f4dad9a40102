// What all attention shares: the rows of a job, and the softmax of a row that meets its keys in passes.

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
  int64_t seen, causal;          // keys that the first row sees, and how many more each next one does: 0 or 1
  int64_t sees(int64_t i) const { return seen + causal * i; }
};

// What a row keeps between passes: its highest score, in powers of two, and the sum of its weights (Milakov and
// Gimelshein 2018).
struct Softmax {
  float top = -__builtin_inff(), total = 0;

  // The first `count` scores to weights 2^(scale * score - top), what follows up to `padded` to zeros. Gives what all
  // that came before has to be multiplied with.
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
    const float shrink = total > 0 ? sum(exp2(set1(before - top))) / 16 : 0.0f;
    total = total * shrink + sum(sums);
    return shrink;
  }
};

}  // namespace
