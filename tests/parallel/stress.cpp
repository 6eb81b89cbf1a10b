// Threads as ranks over one mapping, so that ThreadSanitizer sees every access: random calls while ranks are suspended at
// random, a rank that is suspended for too long, aborts at any moment, and a rank of several threads as a decoder is.
#include <pthread.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "group.h"
#include "kernel_table.h"
#include "pool.h"

namespace shuteye {

// One instruction set is enough here.
KernelTable portable_table();
const KernelTable& active_table() {
  static const KernelTable table = portable_table();
  return table;
}

} // namespace shuteye

using namespace shuteye;

namespace {

constexpr int64_t kSlotBytes = 1024, kMessageBytes = 256;

#define CHECK(condition) \
  do { \
    if (!(condition)) { \
      fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      abort(); \
    } \
  } while (false)

struct Region {
  int64_t size;
  void* base;

  explicit Region(int64_t ranks) : size(ranks) {
    const int64_t nbytes = region_bytes(size, kSlotBytes, kMessageBytes);
    base = aligned_alloc(4096, round_up(nbytes, 4096));
    memset(base, 0, nbytes);
    format_region(base, size, 1, kSlotBytes, kMessageBytes);
    CHECK(check_region(base, nbytes) == nullptr);
    for (int64_t rank = 0; rank < size; rank++) CHECK(take_seat(base, rank) && !take_seat(base, rank));
  }
  Region(const Region&) = delete;
  ~Region() { free(base); }

  template <class Body>
  std::vector<std::thread> start(double timeout_s, const Body& body) {
    std::vector<std::thread> threads;
    for (int64_t rank = 0; rank < size; rank++) {
      threads.emplace_back([this, rank, timeout_s, body] {
        Group group(base, rank);
        group.set_timeout(timeout_s);
        body(group);
      });
    }
    return threads;
  }
};

void join(std::vector<std::thread>& threads) {
  for (auto& thread : threads) thread.join();
}

// --- suspension: a signal whose handler sleeps, wherever the thread is ---------------------------

std::atomic<int> suspension_us{0};

void suspend(int) { usleep(suspension_us.load()); }

void suspend_at_random(std::vector<std::thread>& threads, unsigned seed, const std::atomic<int>& running) {
  std::mt19937 random(seed);
  while (running.load() == static_cast<int>(threads.size())) { // a thread that has ended takes no signal
    suspension_us = random() % 3000;
    pthread_kill(threads[random() % threads.size()].native_handle(), SIGUSR1);
    usleep(random() % 2000);
  }
}

// --- what is computed ---------------------------------------------------------------------------

float value(int64_t rank, int64_t round, int64_t element) {
  return static_cast<float>((rank + 1) * 1000 + round % 97) / static_cast<float>(element + 3);
}

std::vector<float> part_of(int64_t rank, int64_t round, int64_t count) {
  std::vector<float> part(count);
  for (int64_t element = 0; element < count; element++) part[element] = value(rank, round, element);
  return part;
}

float sum_of(int64_t size, int64_t round, int64_t element) {
  float sum = value(0, round, element);
  for (int64_t rank = 1; rank < size; rank++) sum += value(rank, round, element);
  return sum;
}

ShuteyeReduce reduce_of(std::vector<float>& x, bool in_slot = false) {
  ShuteyeReduce call{};
  call.rows = 1;
  call.width = static_cast<int64_t>(x.size());
  call.part = in_slot ? nullptr : x.data();
  call.out = x.data();
  return call;
}

bool reduce_round(Group& group, int64_t round, int64_t count) {
  std::vector<float> x = part_of(group.rank(), round, count);
  if (!group.reduce(reduce_of(x))) return false;
  for (int64_t element = 0; element < count; element++) CHECK(x[element] == sum_of(group.size(), round, element));
  return true;
}

bool gather_round(Group& group, int64_t round, int64_t count) {
  std::vector<int64_t> row_bytes(group.size());
  for (int64_t rank = 0; rank < group.size(); rank++) row_bytes[rank] = (count / 8 + rank) * 4;
  const int64_t rows = 3, to = round % group.size(), width = row_bytes[group.rank()] / 4;
  std::vector<float> part = part_of(group.rank(), round, rows * width), out(rows * (count / 8 + group.size()) * group.size());
  if (!group.gather(part.data(), rows, row_bytes.data(), to, out.data())) return false;
  if (group.rank() != to) return true;
  const float* next = out.data();
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t rank = 0; rank < group.size(); rank++) {
      const int64_t columns = row_bytes[rank] / 4;
      for (int64_t column = 0; column < columns; column++) CHECK(*next++ == value(rank, round, row * columns + column));
    }
  }
  return true;
}

// Even ranks send first: round the ring, or back and forth between two.
bool message_round(Group& group, int64_t round, int64_t count) {
  const int64_t next = (group.rank() + 1) % group.size(), before = (group.rank() + group.size() - 1) % group.size();
  if (next == group.rank()) return true;
  std::vector<float> mine = part_of(group.rank(), round, count), theirs(count);
  const auto send = [&] { return group.send(mine.data(), count * 4, next); };
  const auto receive = [&] { return group.receive(theirs.data(), count * 4, before); };
  if (!(group.rank() == 0 ? send() && receive() : receive() && send())) return false;
  CHECK(theirs == part_of(before, round, count));
  return true;
}

bool random_round(Group& group, std::mt19937& random, int64_t round) {
  const int64_t kind = random() % 8, count = 1 + random() % (random() % 4 ? 200 : 2000);
  if (kind == 0) return group.barrier();
  if (kind == 1) return gather_round(group, round, count);
  if (kind == 2) return message_round(group, round, count);
  return reduce_round(group, round, count);
}

// --- the cases ----------------------------------------------------------------------------------

void suspended_ranks_lose_nothing(unsigned seed, int64_t size, int64_t rounds) {
  Region region(size);
  std::atomic<int> running{static_cast<int>(size)}, may_end{0};
  auto threads = region.start(60.0, [&](Group& group) {
    std::mt19937 random(seed);
    for (int64_t round = 0; round < rounds; round++) CHECK(random_round(group, random, round));
    running--;
    while (!may_end.load()) usleep(100);
  });
  suspend_at_random(threads, seed, running);
  while (running.load() > 0) usleep(100);
  may_end = 1;
  join(threads);
}

void a_rank_suspended_for_too_long_is_named(int64_t size) {
  Region region(size);
  const int64_t stopped = size - 1;
  std::atomic<bool> goes_on{false};
  std::atomic<int64_t> named{0};
  auto threads = region.start(0.15, [&](Group& group) {
    CHECK(group.barrier());
    while (group.rank() == stopped && !goes_on.load()) usleep(1000);
    CHECK(!reduce_round(group, 0, 300));
    CHECK(!group.barrier());
    ShuteyeFault fault;
    CHECK(group.fault(fault) && fault.missing == uint64_t{1} << stopped && fault.by != stopped);
    CHECK(strstr(fault.reason, "in all_reduce for rank"));
    if (++named == size - 1) goes_on = true;
  });
  join(threads);
}

void an_abort_at_any_moment_ends_all(unsigned seed, int64_t size) {
  Region region(size);
  auto threads = region.start(60.0, [&](Group& group) {
    std::mt19937 random(seed);
    for (int64_t round = 0; random_round(group, random, round); round++) {
      if (group.rank() == round % size) usleep(1); // the others come to the next round while it is in this one
    }
    CHECK(group.aborted());
    for (int64_t turn = 0; turn < 3; turn++) CHECK(!reduce_round(group, turn + 1, 200)); // others may be reading still
  });
  usleep(seed % 20000);
  Group coordinator(region.base, size);
  std::thread another([&] { coordinator.abort("from another thread"); });
  coordinator.abort("the test wants it");
  another.join();
  join(threads);
  ShuteyeFault fault;
  CHECK(coordinator.fault(fault) && fault.by == size);
}

// Nobody waits until a nap ends (0.2 s) for what has come: of two ranks one is always a little late.
void sleepers_are_woken() {
  constexpr int64_t kRounds = 150;
  Region region(2);
  timespec begun, ended;
  clock_gettime(CLOCK_MONOTONIC, &begun);
  auto threads = region.start(60.0, [&](Group& group) {
    for (int64_t round = 0; round < kRounds; round++) {
      if (group.rank() == round % 2) usleep(5000);
      CHECK(round % 4 < 2 ? reduce_round(group, round, 20) : message_round(group, round, 20));
    }
    if (group.rank() == 0) CHECK(!group.barrier());
    usleep(5000);
    group.abort("the test wants it");
  });
  join(threads);
  clock_gettime(CLOCK_MONOTONIC, &ended);
  CHECK(ended.tv_sec - begun.tv_sec < 6); // naps would make it 15 s
}

// As in a decoder: several threads write the slot, one begins, all add up their share.
void ranks_of_several_threads(int64_t size, int64_t rounds) {
  constexpr int kThreads = 2;
  constexpr int64_t kCount = 250, kUnits = 10;
  Region region(size);
  auto threads = region.start(60.0, [&](Group& group) {
    std::unique_ptr<Phase[]> phases(new Phase[3 * rounds]);
    std::vector<float> x(kCount);
    const ShuteyeReduce call = reduce_of(x, true);
    CHECK(group.fits(call));
    const auto work = [&] {
      for (int64_t round = 0; round < rounds; round++) {
        phases[3 * round].run(kUnits, kThreads, [&](int64_t first, int64_t end) {
          auto* slot = static_cast<float*>(group.slot());
          for (int64_t element = first * kCount / kUnits; element < end * kCount / kUnits; element++)
            slot[element] = value(group.rank(), round, element);
        });
        phases[3 * round + 1].run(1, kThreads, [&](int64_t, int64_t) { CHECK(group.begin(call)); });
        phases[3 * round + 2].run(kUnits, kThreads, [&](int64_t first, int64_t end) {
          group.sum(call, first * kCount / kUnits, end * kCount / kUnits);
          for (int64_t element = first * kCount / kUnits; element < end * kCount / kUnits; element++)
            CHECK(x[element] == sum_of(group.size(), round, element));
        });
      }
    };
    std::thread other(work);
    work();
    other.join();
  });
  join(threads);
}

} // namespace

int main(int count, char** arguments) {
  const unsigned seed = count > 1 ? static_cast<unsigned>(atoi(arguments[1])) : 1;
  const int64_t rounds = count > 2 ? atoi(arguments[2]) : 1000;
  struct sigaction action {};
  action.sa_handler = suspend;
  sigaction(SIGUSR1, &action, nullptr);
  for (int64_t size = 1; size <= 4; size++) suspended_ranks_lose_nothing(seed + size, size, rounds);
  for (int64_t size = 2; size <= 4; size++) a_rank_suspended_for_too_long_is_named(size);
  sleepers_are_woken();
  for (unsigned turn = 0; turn < 100; turn++) an_abort_at_any_moment_ends_all(seed * 7919 + turn * 1237, 2 + turn % 3);
  for (int64_t size = 1; size <= 3; size++) ranks_of_several_threads(size, rounds);
  printf("seed %u: well\n", seed);
}
