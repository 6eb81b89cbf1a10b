// The workers: they spin for a moment after each job, then sleep until the next. Knows nothing of phases.
//
// Joining: a worker raises `active`, then looks whether the job is still open; the caller closes the job, then waits
// until `active` is 0. Both orders are sequentially consistent, so a worker either is waited for or does not join.
//
// fork: the child inherits no threads. Its pool starts new ones on first use; the fork waits for a running job.
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>

namespace shuteye {
namespace {

using Clock = std::chrono::steady_clock;

// Long enough to bridge the gap between two foreign calls; an engine that idles longer than this costs no CPU.
constexpr std::chrono::microseconds kSpinTime{50};
constexpr int64_t kSpinsBeforeYield = 2000;

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Pool {
  std::mutex callers;  // held for a whole job
  std::mutex sleeping; // guards the condition
  std::condition_variable wake;
  std::atomic<uint64_t> epoch{0};
  std::atomic<bool> open{false};
  std::atomic<bool> stopping{false};
  std::atomic<int> active{0};
  std::atomic<int> sleepers{0};
  void (*work)(void*, int) = nullptr;
  void* context = nullptr;
  int num_threads = 1;
  int num_started = 0;
  pthread_t threads[kMaxThreads];

  void run(void (*new_work)(void*, int), void* new_context);
  void start();
  void stop();
  void serve(int index);
  void await_change(uint64_t seen);
  void announce();
};

// Never destroyed: workers may outlive static destructors.
Pool* pool = nullptr;
std::once_flag made;

Pool& the_pool() {
  std::call_once(made, [] {
    pool = new Pool;
    pthread_atfork([] { pool->callers.lock(); }, [] { pool->callers.unlock(); },
                   [] {
                     const int num_threads = pool->num_threads;
                     pool = new (pool) Pool; // in place: its threads do not exist here
                     pool->num_threads = num_threads;
                   });
  });
  return *pool;
}

struct Start {
  Pool* pool;
  int index;
};

void* enter(void* argument) {
  const Start start = *static_cast<Start*>(argument);
  delete static_cast<Start*>(argument);
  start.pool->serve(start.index);
  return nullptr;
}

void Pool::start() {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before); // signals are for the interpreter's threads
  for (; num_started < num_threads - 1; num_started++) {
    auto* argument = new Start{this, num_started + 1};
    if (pthread_create(&threads[num_started], nullptr, enter, argument) != 0) {
      delete argument;
      break; // fewer threads: slower, not wrong
    }
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void Pool::announce() {
  epoch.fetch_add(1);
  if (sleepers.load() == 0) return;
  { std::lock_guard<std::mutex> guard(sleeping); }
  wake.notify_all();
}

void Pool::stop() {
  stopping.store(true);
  announce();
  for (int index = 0; index < num_started; index++) pthread_join(threads[index], nullptr);
  num_started = 0;
  stopping.store(false);
}

void Pool::run(void (*new_work)(void*, int), void* new_context) {
  if (num_started < num_threads - 1) start();
  work = new_work;
  context = new_context;
  open.store(true);
  if (num_started > 0) announce();
  work(context, 0);
  open.store(false);
  for (int64_t spins = 0; active.load() != 0;) relax(spins);
}

void Pool::await_change(uint64_t seen) {
  const auto deadline = Clock::now() + kSpinTime;
  for (int turn = 1; epoch.load() == seen; turn++) {
    pause_cpu();
    if (turn % 32 == 0 && Clock::now() > deadline) break;
  }
  if (epoch.load() != seen) return;
  std::unique_lock<std::mutex> lock(sleeping);
  sleepers.fetch_add(1); // before the last look at epoch: whoever changes it after that look sees a sleeper
  wake.wait(lock, [&] { return epoch.load() != seen; });
  sleepers.fetch_sub(1);
}

void Pool::serve(int index) {
  uint64_t seen = 0;
  while (!stopping.load()) {
    active.fetch_add(1);
    if (open.load() && epoch.load() != seen) {
      seen = epoch.load();
      work(context, index);
    } else {
      seen = epoch.load();
    }
    active.fetch_sub(1);
    await_change(seen);
  }
}

} // namespace

void relax(int64_t& spins) {
  if (++spins < kSpinsBeforeYield) {
    pause_cpu();
  } else {
    sched_yield();
  }
}

void pool_run(void (*work)(void*, int), void* context) {
  Pool& pool = the_pool();
  std::lock_guard<std::mutex> guard(pool.callers);
  pool.run(work, context);
}

int pool_num_threads() { return the_pool().num_threads; }

void pool_set_num_threads(int num_threads) {
  Pool& pool = the_pool();
  std::lock_guard<std::mutex> guard(pool.callers);
  const int wanted = num_threads < 1 ? 1 : num_threads > kMaxThreads ? kMaxThreads : num_threads;
  if (wanted == pool.num_threads) return;
  pool.stop();
  pool.num_threads = wanted;
}

void pool_stop() {
  Pool& pool = the_pool();
  std::lock_guard<std::mutex> guard(pool.callers);
  pool.stop();
}

} // namespace shuteye
