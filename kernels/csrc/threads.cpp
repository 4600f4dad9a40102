// A pool that counts finished chunks, not threads: a job is over when its chunks are, no matter which thread ran them. A
// worker that the system has descheduled delays a job only while it holds a chunk. With a barrier per thread instead, a
// GEMV fell to 3 GB/s when another process used one of two cores; this kept 15.
#include "threads.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <unistd.h>
#endif

namespace {

// Python needs about 10 us between two kernels of a step, and a wake-up costs as much. Spinning longer would take the
// core from torch's own threads.
constexpr auto kSpin = std::chrono::microseconds(40);

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // some tens of cycles; `yield` is a no-op on most cores
#else
  std::this_thread::yield();
#endif
}

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads) {
    for (int i = 1; i < threads; i++) std::thread([this] { serve(); }).detach();
  }

  int threads() const { return threads_; }

  // One job at a time; false if another thread's job is running.
  bool run(int64_t chunks, void (*f)(const void*, int64_t), const void* context) {
    if (!busy_.try_lock()) return false;
    std::lock_guard<std::mutex> held(busy_, std::adopt_lock);
    const uint64_t job = (ticket_.load() >> 32) + 1;
    ticket_.store(job << 32 | 0xffffffffu);  // closed while it is being set up
    done_.store(0), f_ = f, context_ = context;
    chunks_.store(chunks);
    ticket_.store(job << 32);
    if (sleeping_.load() > 0) {
      { std::lock_guard<std::mutex> lock(sleep_); }
      wake_.notify_all();
    }
    work(job);
    for (int spins = 0; done_.load(std::memory_order_acquire) != chunks; spins++)
      spins < 4000 ? pause() : std::this_thread::yield();
    return true;
  }

  void stop() {
    stop_.store(true);
    { std::lock_guard<std::mutex> lock(sleep_); }
    wake_.notify_all();
  }

 private:
  // The low half of the ticket is the next chunk, the high half its job.
  bool open(uint64_t ticket) const { return (int64_t)(ticket & 0xffffffffu) < chunks_.load(std::memory_order_acquire); }

  void work(uint64_t job) {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while (ticket >> 32 == job && open(ticket)) {
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
      f_(context_, (int64_t)(ticket & 0xffffffffu));  // a claimed chunk keeps its job, so these two are its own
      done_.fetch_add(1, std::memory_order_release);
      ticket = ticket_.load(std::memory_order_acquire);
    }
  }

  void serve() {
    auto idle_since = std::chrono::steady_clock::now();
    for (int spins = 0; !stop_.load(std::memory_order_relaxed); spins++) {
      const uint64_t ticket = ticket_.load(std::memory_order_acquire);
      if (open(ticket)) {
        work(ticket >> 32);
        idle_since = std::chrono::steady_clock::now(), spins = 0;
      } else if (spins % 64 || std::chrono::steady_clock::now() - idle_since < kSpin) {
        pause();
      } else {
        std::unique_lock<std::mutex> lock(sleep_);
        sleeping_.fetch_add(1);
        wake_.wait(lock, [&] { return stop_.load() || open(ticket_.load()); });
        sleeping_.fetch_sub(1);
        idle_since = std::chrono::steady_clock::now();
      }
    }
  }

  const int threads_;
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<int64_t> chunks_{0};
  std::atomic<int> sleeping_{0};
  std::atomic<bool> stop_{false};
  void (*f_)(const void*, int64_t) = nullptr;
  const void* context_ = nullptr;
  std::mutex busy_, sleep_;
  std::condition_variable wake_;
};

// Pools are never destroyed: at exit a worker may sleep in one, and another thread may still run a job on an old one.
std::atomic<Pool*> g_pool{nullptr};
std::atomic<int64_t> g_threads{1};
std::atomic<int64_t> g_pairs{-1};
std::mutex g_making;

Pool* pool() {
  const int wanted = (int)g_threads.load();
  Pool* found = g_pool.load(std::memory_order_acquire);
  if (found && found->threads() == wanted) return found;
  return nullptr;
}

Pool* make_pool() {
#if defined(__unix__) || defined(__APPLE__)
  // A forked child has none of the workers: it drops the pool and makes another when it first needs one.
  static const int registered = pthread_atfork(nullptr, nullptr, [] {
    g_pool.store(nullptr);
    new (&g_making) std::mutex;
  });
  (void)registered;
#endif
  std::lock_guard<std::mutex> lock(g_making);
  if (Pool* found = pool()) return found;
  Pool* made = new Pool((int)g_threads.load());
  if (Pool* old = g_pool.exchange(made)) old->stop();
  return made;
}

struct Scratch {
  void* memory = nullptr;
  int64_t bytes = 0;
  ~Scratch() { std::free(memory); }
};

// The chunks of one thread's calls, to compute how evenly more threads would share them.
struct Log {
  int64_t* numbers = nullptr;
  int64_t capacity = 0, used = 0;
  void put(int64_t number) {
    if (used < capacity) numbers[used] = number;
    used++;
  }
};
thread_local Log t_log;

#if defined(_SC_LEVEL1_DCACHE_ASSOC)
const int64_t kCacheWays = sysconf(_SC_LEVEL1_DCACHE_ASSOC) > 0 ? sysconf(_SC_LEVEL1_DCACHE_ASSOC) : 0;
#else
const int64_t kCacheWays = 0;
#endif

}  // namespace

extern "C" int64_t qvl_log_chunks(int64_t* log, int64_t capacity) {
  const int64_t used = t_log.used;
  t_log.numbers = log, t_log.capacity = capacity, t_log.used = 0;
  return used;
}

extern "C" void qvl_set_threads(int64_t count) { g_threads.store(count < 1 ? 1 : count); }

extern "C" int64_t qvl_threads() { return g_threads.load(std::memory_order_relaxed); }

extern "C" int64_t qvl_bf16_pairs() { return g_pairs.load(std::memory_order_relaxed); }

extern "C" void qvl_set_bf16_pairs(int64_t choice) { g_pairs.store(choice); }

extern "C" int64_t qvl_cache_ways() { return kCacheWays; }

extern "C" int64_t qvl_nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

extern "C" void qvl_run(int64_t chunks, void (*f)(const void*, int64_t), const void* context) {
  if (t_log.numbers) {
    t_log.put(chunks);
    for (int64_t i = 0; i < chunks; i++) {
      const int64_t began = qvl_nanoseconds();
      f(context, i);
      t_log.put(qvl_nanoseconds() - began);
    }
    return;
  }
  if (chunks > 1 && g_threads.load(std::memory_order_relaxed) > 1) {
    Pool* ready = pool();
    if (!ready) ready = make_pool();
    if (ready->run(chunks, f, context)) return;
  }
  for (int64_t i = 0; i < chunks; i++) f(context, i);
}

extern "C" void* qvl_scratch(int slot, int64_t bytes) {
  static thread_local Scratch slots[8];
  Scratch& s = slots[slot];
  if (s.bytes < bytes) {
    std::free(s.memory);
    s.bytes = (bytes + 4095) / 4096 * 4096;
    s.memory = std::aligned_alloc(64, (size_t)s.bytes);
    if (!s.memory) std::abort();
  }
  return s.memory;
}
