// A decode step again, without Python. Between two kernels it needs 20 us to 100 us with the caches that a streamed weight
// leaves behind, in some 260 calls: 18 ms of a 230 ms step of the full Int4 model. Recorded, the calls follow one another
// here. What is recorded are addresses, so every tensor behind them must stay where it is.
#include "library.h"

extern "C" void qvl_replay(const Call* calls, int64_t count) {
  for (int64_t i = 0; i < count; i++) calls[i].kernel->run(calls[i].arguments);
}
