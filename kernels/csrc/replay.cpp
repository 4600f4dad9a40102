// Replays a recorded decode step without Python. Python needs 20 us to 100 us between two kernels, since streamed weights
// evict its data from the caches: 18 ms of a 230 ms step of the full Int4 model, in about 260 calls. The record holds
// addresses, so every tensor behind them must stay in place.
#include "library.h"

extern "C" void qvl_replay(const Call* calls, int64_t count) {
  for (int64_t i = 0; i < count; i++) calls[i].kernel->run(calls[i].arguments);
}
