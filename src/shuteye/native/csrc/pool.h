// One persistent thread pool per process, and phases that share work by counting. Knows nothing of what is computed.
#pragma once
#include <atomic>
#include <cstdint>

namespace shuteye {

constexpr int kMaxThreads = 64;

// Runs work(context, thread_index) on the caller (index 0) and on every worker that wakes up in time, and returns when
// all that joined have left. Work must not count on any worker joining. Callers are served one after the other.
void pool_run(void (*work)(void* context, int thread_index), void* context);

int pool_num_threads();
void pool_set_num_threads(int num_threads);
void pool_stop(); // joins the workers; the next pool_run starts them anew

void relax(int64_t& spins); // one turn of a waiting loop: spins at first, then yields the CPU

// A piece of a job that is complete when all of its units are: it waits for work done, not for threads to arrive, so
// that a worker which is asleep or descheduled between chunks holds nobody up.
struct Phase {
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<int64_t> done{0};

  void reset() {
    next.store(0, std::memory_order_relaxed);
    done.store(0, std::memory_order_relaxed);
  }

  // Takes [first, end); large pieces first, `least` units at last.
  bool take(int64_t num_units, int num_threads, int64_t least, int64_t& first, int64_t& end) {
    first = next.load(std::memory_order_relaxed);
    do {
      if (first >= num_units) return false;
      const int64_t share = (num_units - first) / num_threads;
      end = first + (share > least ? share : least);
      if (end > num_units) end = num_units;
    } while (!next.compare_exchange_weak(first, end, std::memory_order_relaxed));
    return true;
  }

  template <class Body>
  void run(int64_t num_units, int num_threads, const Body& body, int64_t least = 1) {
    for (int64_t first, end; take(num_units, num_threads, least, first, end);) {
      body(first, end);
      done.fetch_add(end - first, std::memory_order_release);
    }
    for (int64_t spins = 0; done.load(std::memory_order_acquire) < num_units;) relax(spins);
  }
};

} // namespace shuteye
