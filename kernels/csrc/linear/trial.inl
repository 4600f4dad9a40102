// Chooses the fastest of up to four ways to compute the same numbers, by measuring them in turns on the first calls that
// are bound by memory. Which one it is depends on the CPU's prefetchers and on the memory, which no feature flag tells.

namespace {

class Trial {
 public:
  struct Turn {
    int way;
    int64_t began;  // 0: not measured
  };

  // The way to use for a weight of this size, one of `ways`; the first for a weight that a cache may hold.
  Turn begin(int64_t bytes, int ways) {
    if (bytes < kLeastBytes) return {0, 0};
    const int64_t settled = __atomic_load_n(&settled_, __ATOMIC_RELAXED);
    if (settled >= 0) return {(int)settled, 0};
    const int64_t call = __atomic_fetch_add(&calls_, 1, __ATOMIC_RELAXED);
    // Each round begins with another way: a layer calls in turns too, and a way must not always meet the same of its shapes.
    if (call < kTurns * ways) return {(int)((call + call / ways) % ways), qvl_nanoseconds()};
    const int best = fastest(ways);
    __atomic_store_n(&settled_, best, __ATOMIC_RELAXED);
    return {best, 0};
  }

  void end(int64_t bytes, Turn turn) {
    if (!turn.began) return;
    const int64_t spent = (qvl_nanoseconds() - turn.began) * 4096 / (bytes >> 10), before = least(turn.way);
    if (!before || spent < before) __atomic_store_n(&least_[turn.way], spent, __ATOMIC_RELAXED);
  }

 private:
  static constexpr int64_t kLeastBytes = 4 << 20, kTurns = 8;

  int64_t least(int way) const { return __atomic_load_n(&least_[way], __ATOMIC_RELAXED); }

  // The first unless another is 2 % faster.
  int fastest(int ways) const {
    int best = 0;
    for (int way = 1; way < ways; way++)
      if (least(way) * 100 < least(best) * (best ? 100 : 98)) best = way;
    return best;
  }

  int64_t settled_ = -1, calls_ = 0, least_[4] = {};
};

}  // namespace
