// Greedy sampling: the most likely token of each row of logits, and its log probability.

namespace {

// logits [rows, width]; tokens [rows], the first of several that are equal; logprobs [rows] = -log(sum e^(x - highest)).
// A row with NaN or +inf, or of -inf only, has a term that is NaN, and so the log probability NaN.
void greedy(const void* logits, int64_t dtype, int64_t rows, int64_t width, int64_t* tokens, float* logprobs) {
  constexpr int64_t kStretch = 1024;
  parallel(rows, [&](int64_t row) {
    alignas(64) float line[16];
    const void* x = at(logits, dtype, row * width);
    float top = -__builtin_inff();
    int64_t found = 0;  // start of the stretch with the highest logit
    for (int64_t start = 0; start < width; start += kStretch) {
      const int64_t end = start + kStretch < width ? start + kStretch : width;
      F highest_here = set1(top);
      int64_t i = start;
      for (; i + 16 <= end; i += 16) highest_here = max(highest_here, load_as(x, dtype, i));
      float here = highest(highest_here);
      if (i < end) store(line, load_part(x, dtype, i, end - i));
      for (int64_t j = i; j < end; j++) here = line[j - i] > here ? line[j - i] : here;
      if (here > top) top = here, found = start;
    }
    F sums = zero();
    float total = 0;
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) sums = add(sums, exp(sub(load_as(x, dtype, i), set1(top))));
    if (i < width) store(line, exp(sub(load_part(x, dtype, i, width - i), set1(top))));
    for (int64_t j = i; j < width; j++) total += line[j - i];
    logprobs[row] = -__builtin_logf(sum(sums) + total);
    for (i = found; i < width; i += 16) {
      const int64_t count = width - i < 16 ? width - i : 16;
      store(line, load_upto(x, dtype, i, count));
      int64_t j = 0;
      while (j < count && line[j] != top) j++;
      if (j < count) {
        found = i + j;
        break;
      }
    }
    tokens[row] = found;
  });
}

}  // namespace
