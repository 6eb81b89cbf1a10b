// See group.h. The mapping: header | a seat per rank | a channel per pair | reasons | slots | messages.
//
// Waiting: spin for a moment, then give the core away (two ranks may share one), then sleep on the rank's own bell. Whoever
// changes something that a rank may wait for looks whether that rank is asleep, and rings. A rank says that it is asleep,
// then looks once more; the other makes its change, then looks who is asleep. All four are sequentially consistent, so one
// of them sees the other.
#include "group.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "kernel_table.h"

namespace shuteye {

struct alignas(64) Seat {
  std::atomic<uint64_t> arrived; // rounds entered
  Group::Call calls[2];          // of the last two rounds; what they say is there before `arrived` says so
  alignas(64) std::atomic<uint32_t> bell;
  std::atomic<uint32_t> asleep;
  std::atomic<uint32_t> taken;
};

// Messages of one rank to another; at most two are under way.
struct alignas(64) Channel {
  std::atomic<uint64_t> sent;
  int64_t nbytes[2]; // of the whole that the message is a piece of
  alignas(64) std::atomic<uint64_t> received;
};

struct RegionHeader : ShuteyeRegion {
  alignas(64) std::atomic<uint64_t> aborted; // 1 + the rank that did, whose reason counts
};

struct Reason {
  std::atomic<uint32_t> begun;
  uint64_t missing;
  char text[sizeof(ShuteyeFault::reason)];
};

static_assert(std::atomic<uint64_t>::is_always_lock_free && sizeof(std::atomic<uint32_t>) == 4);

namespace {

constexpr uint64_t kMagic = 0x70756f7267657973; // "syegroup"
constexpr int64_t kVersion = 1;
constexpr int64_t kPage = 4096;
constexpr int kSpins = 100; // two ranks may share a core: 2,000 would cost them 100 us a round
constexpr int64_t kYieldNs = 1'000'000;
constexpr int64_t kNapNs = 200'000'000; // nobody's wake is lost; this is for what nobody would ring for

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * int64_t{1'000'000'000} + now.tv_nsec;
}

// Not the private kind: the word is shared between processes.
void futex_wait(std::atomic<uint32_t>& word, uint32_t seen, int64_t nanoseconds) {
  const timespec limit{nanoseconds / 1'000'000'000, nanoseconds % 1'000'000'000};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, seen, &limit, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, 1 << 30, nullptr, nullptr, 0);
}

int64_t itemsize(int64_t dtype) { return dtype == SHUTEYE_BFLOAT16 ? 2 : 4; }
int64_t smaller(int64_t left, int64_t right) { return left < right ? left : right; }
uint64_t bit(int64_t rank) { return uint64_t{1} << rank; }

const char* name_of(Op op) {
  switch (op) {
    case Op::barrier: return "barrier";
    case Op::reduce: return "all_reduce";
    case Op::gather: return "gather";
  }
  return "an unknown call";
}

// Bytes [offset, offset + nbytes) of a part [rows, part_width] go to their places in [rows, out_width].
struct Columns {
  char* out;
  int64_t first; // of the part's columns in out
  int64_t part_width;
  int64_t out_width;

  void put(const char* piece, int64_t offset, int64_t nbytes) const {
    while (nbytes > 0) {
      const int64_t row = offset / part_width, column = offset % part_width;
      const int64_t length = smaller(part_width - column, nbytes);
      memcpy(out + row * out_width + first + column, piece, length);
      piece += length, offset += length, nbytes -= length;
    }
  }
};

} // namespace

Layout::Layout(const ShuteyeRegion& region) {
  seats = round_up(sizeof(RegionHeader), 64);
  channels = seats + region.size * static_cast<int64_t>(sizeof(Seat));
  reasons = channels + region.size * region.size * static_cast<int64_t>(sizeof(Channel));
  slots = round_up(reasons + (region.size + 1) * static_cast<int64_t>(sizeof(Reason)), kPage);
  messages = slots + region.size * 2 * region.slot_bytes;
  nbytes = messages + region.size * region.size * 2 * region.message_bytes;
}

int64_t region_bytes(int64_t size, int64_t slot_bytes, int64_t message_bytes) {
  if (size < 1 || size > kMaxRanks || slot_bytes < 64 || message_bytes < 64) return 0;
  if (slot_bytes % 64 || message_bytes % 64) return 0;
  return Layout({0, 0, 0, size, slot_bytes, message_bytes, 0}).nbytes;
}

void format_region(void* base, int64_t size, int64_t epoch, int64_t slot_bytes, int64_t message_bytes) {
  ShuteyeRegion region{kMagic, kVersion, epoch, size, slot_bytes, message_bytes, 0};
  region.nbytes = Layout(region).nbytes;
  static_cast<ShuteyeRegion&>(*static_cast<RegionHeader*>(base)) = region;
}

const char* check_region(const void* base, int64_t nbytes) {
  if (nbytes < static_cast<int64_t>(sizeof(RegionHeader))) return "it is too small";
  const auto& region = *static_cast<const ShuteyeRegion*>(base);
  if (region.magic != kMagic) return "it is not the memory of a group";
  if (region.version != kVersion) return "another version of shuteye made it";
  if (region.nbytes > nbytes || region.nbytes != region_bytes(region.size, region.slot_bytes, region.message_bytes))
    return "its size is not what its header says";
  return nullptr;
}

bool take_seat(void* base, int64_t rank) {
  const Layout layout(*static_cast<const ShuteyeRegion*>(base));
  return reinterpret_cast<Seat*>(static_cast<char*>(base) + layout.seats)[rank].taken.exchange(1) == 0;
}

Group::Group(void* base, int64_t rank)
    : base_(static_cast<char*>(base)),
      header_(static_cast<RegionHeader*>(base)),
      layout_(*header_),
      rank_(rank),
      size_(header_->size) {}

Seat& Group::seat(int64_t rank) const { return reinterpret_cast<Seat*>(base_ + layout_.seats)[rank]; }

Channel& Group::channel(int64_t source, int64_t to) const {
  return reinterpret_cast<Channel*>(base_ + layout_.channels)[source * size_ + to];
}

Reason& Group::reason(int64_t rank) const { return reinterpret_cast<Reason*>(base_ + layout_.reasons)[rank]; }

char* Group::slot_of(int64_t rank, uint64_t round) const {
  return base_ + layout_.slots + (rank * 2 + static_cast<int64_t>(round % 2)) * header_->slot_bytes;
}

char* Group::message_of(int64_t source, int64_t to, uint64_t number) const {
  const int64_t index = (source * size_ + to) * 2 + static_cast<int64_t>(number % 2);
  return base_ + layout_.messages + index * header_->message_bytes;
}

// --- waiting ------------------------------------------------------------------------------------

void Group::ring(int64_t rank) {
  Seat& other = seat(rank);
  if (!other.asleep.load()) return;
  other.bell.fetch_add(1);
  futex_wake(other.bell);
}

void Group::ring_all() {
  for (int64_t rank = 0; rank < size_; rank++) {
    if (rank != rank_) ring(rank);
  }
}

// ready(): whether what is waited for is there. missing(): whom it is waited for, as bits.
template <class Ready, class Missing>
bool Group::wait(const char* what, const Ready& ready, const Missing& missing) {
  for (int spins = 0; spins < kSpins; spins++) {
    if (ready()) return true;
    pause_cpu();
  }
  const int64_t begun = now_ns(), deadline = begun + timeout_ns_;
  while (now_ns() < begun + smaller(kYieldNs, timeout_ns_)) {
    if (ready()) return true;
    if (aborted()) return false;
    sched_yield();
  }
  if (sleep_until(ready, deadline)) return true;
  if (!aborted()) outlasted(what, missing());
  return false;
}

// False: the group was aborted, or the deadline has passed.
template <class Ready>
bool Group::sleep_until(const Ready& ready, int64_t deadline) {
  Seat& own = seat(rank_);
  bool is_ready = false;
  while (true) {
    const uint32_t seen = own.bell.load();
    own.asleep.store(1);
    is_ready = ready();
    const int64_t left = deadline - now_ns();
    if (is_ready || aborted() || left <= 0) break;
    futex_wait(own.bell, seen, smaller(left, kNapNs));
  }
  own.asleep.store(0);
  return is_ready;
}

void Group::outlasted(const char* what, uint64_t missing) {
  char text[sizeof(ShuteyeFault::reason)];
  int length = snprintf(text, sizeof text, "it waited %.3g s in %s for rank", static_cast<double>(timeout_ns_) / 1e9, what);
  const char* separator = " ";
  for (int64_t rank = 0; rank < size_; rank++) {
    if (!(missing & bit(rank)) || length >= static_cast<int>(sizeof text)) continue;
    length += snprintf(text + length, sizeof text - length, "%s%d", separator, static_cast<int>(rank));
    separator = ", ";
  }
  abort(text, missing);
}

// --- aborting -----------------------------------------------------------------------------------

bool Group::aborted() const { return header_->aborted.load() != 0; }

void Group::abort(const char* why, uint64_t missing) {
  Reason& own = reason(rank_);
  if (own.begun.exchange(1) != 0) { // by another thread of this rank, or long ago
    while (!aborted()) sched_yield();
    return;
  }
  own.missing = missing;
  snprintf(own.text, sizeof own.text, "%s", why);
  uint64_t nobody = 0;
  header_->aborted.compare_exchange_strong(nobody, static_cast<uint64_t>(rank_) + 1);
  ring_all();
}

bool Group::fault(ShuteyeFault& fault) const {
  const uint64_t who = header_->aborted.load();
  if (who == 0) return false;
  const Reason& said = reason(static_cast<int64_t>(who) - 1);
  fault.by = static_cast<int64_t>(who) - 1;
  fault.missing = said.missing;
  memcpy(fault.reason, said.text, sizeof fault.reason);
  return true;
}

// --- rounds -------------------------------------------------------------------------------------

uint64_t Group::not_arrived() const {
  uint64_t missing = 0;
  for (int64_t rank = 0; rank < size_; rank++) {
    if (seat(rank).arrived.load() < round_) missing |= bit(rank);
  }
  return missing;
}

// Enters the next round and waits for everybody.
bool Group::round(const Call& call) {
  if (aborted()) return false;
  Seat& own = seat(rank_);
  own.calls[round_ % 2] = call;
  round_++;
  own.arrived.store(round_);
  ring_all();
  const auto missing = [&] { return not_arrived(); };
  return wait(name_of(call.op), [&] { return not_arrived() == 0; }, missing) && agree(call);
}

bool Group::agree(const Call& call) {
  for (int64_t rank = 0; rank < size_; rank++) {
    const Call& other = seat(rank).calls[(round_ - 1) % 2];
    const bool same_width = other.width == call.width || call.op == Op::gather; // which looks by itself
    if (other.op == call.op && other.dtype == call.dtype && other.to == call.to && other.rows == call.rows && same_width)
      continue;
    char text[sizeof(ShuteyeFault::reason)];
    snprintf(text, sizeof text,
             "ranks are in different calls: it is in %s (dtype %d, %lld by %lld), rank %d in %s (dtype %d, %lld by %lld)",
             name_of(call.op), call.dtype, static_cast<long long>(call.rows), static_cast<long long>(call.width),
             static_cast<int>(rank), name_of(other.op), other.dtype, static_cast<long long>(other.rows),
             static_cast<long long>(other.width));
    abort(text);
    return false;
  }
  return true;
}

bool Group::barrier() { return round({Op::barrier, 0, 0, 0, 0}); }

bool Group::fits(const ShuteyeReduce& call) const {
  return call.rows * call.width * itemsize(call.part_dtype) <= header_->slot_bytes;
}

void* Group::slot() { return slot_of(rank_, round_); }

bool Group::begin(const ShuteyeReduce& call) {
  return round({Op::reduce, static_cast<uint8_t>(call.part_dtype), 0, static_cast<uint32_t>(call.rows), call.width});
}

void Group::sum(const ShuteyeReduce& call, int64_t first, int64_t end) const { sum_from(call, 0, first, end); }

void Group::sum_from(const ShuteyeReduce& call, int64_t begin, int64_t first, int64_t end) const {
  const void* parts[kMaxRanks];
  for (int64_t rank = 0; rank < size_; rank++) parts[rank] = slot_of(rank, round_ - 1);
  active_table().sum_ranks[call.dtype][call.part_dtype]({&call, parts, size_, begin}, first, end);
}

bool Group::reduce(const ShuteyeReduce& call) {
  const int64_t count = call.rows * call.width, item = itemsize(call.part_dtype);
  const int64_t most = header_->slot_bytes / item;
  int64_t first = 0;
  do {
    if (aborted()) return false; // before the slot is written: after a failed round somebody may still read it
    const int64_t end = smaller(first + most, count);
    if (call.part) memcpy(slot(), static_cast<const char*>(call.part) + first * item, (end - first) * item);
    if (!begin(call)) return false;
    sum_from(call, first, first, end);
    first = end;
  } while (first < count);
  return true;
}

bool Group::gather(const void* part, int64_t rows, const int64_t* row_bytes, int64_t to, void* out) {
  int64_t out_width = 0, longest = 0;
  for (int64_t rank = 0; rank < size_; rank++) {
    out_width += row_bytes[rank];
    if (rows * row_bytes[rank] > longest) longest = rows * row_bytes[rank];
  }
  const Call call{Op::gather, 0, static_cast<uint16_t>(to), static_cast<uint32_t>(rows), row_bytes[rank_]};
  int64_t offset = 0;
  do {
    if (aborted()) return false; // as above
    const auto piece = [&](int64_t rank) {
      const int64_t left = rows * row_bytes[rank] - offset;
      return left < 0 ? 0 : smaller(left, header_->slot_bytes);
    };
    if (piece(rank_)) memcpy(slot(), static_cast<const char*>(part) + offset, piece(rank_));
    if (!round(call)) return false;
    int64_t column = 0;
    for (int64_t rank = 0; rank < size_; rank++) {
      const int64_t width = seat(rank).calls[(round_ - 1) % 2].width;
      if (width != row_bytes[rank]) {
        abort("ranks differ in how wide the parts of gather are");
        return false;
      }
      const Columns columns{static_cast<char*>(out), column, width, out_width};
      if (rank_ == to) columns.put(slot_of(rank, round_ - 1), offset, piece(rank));
      column += width;
    }
    offset += header_->slot_bytes;
  } while (offset < longest);
  return true;
}

// --- messages -----------------------------------------------------------------------------------

bool Group::send(const void* data, int64_t nbytes, int64_t to) {
  Channel& line = channel(rank_, to);
  int64_t offset = 0;
  do {
    const uint64_t number = line.sent.load();
    if (aborted()) return false;
    if (!wait("send", [&] { return number - line.received.load() < 2; }, [&] { return bit(to); })) return false;
    const int64_t length = smaller(nbytes - offset, header_->message_bytes);
    if (length) memcpy(message_of(rank_, to, number), static_cast<const char*>(data) + offset, length);
    line.nbytes[number % 2] = nbytes;
    line.sent.store(number + 1);
    ring(to);
    offset += length;
  } while (offset < nbytes);
  return true;
}

bool Group::receive(void* data, int64_t nbytes, int64_t source) {
  Channel& line = channel(source, rank_);
  int64_t offset = 0;
  do {
    const uint64_t number = line.received.load();
    if (aborted()) return false;
    if (!wait("recv", [&] { return line.sent.load() > number; }, [&] { return bit(source); })) return false;
    if (line.nbytes[number % 2] != nbytes) {
      char text[128];
      snprintf(text, sizeof text, "rank %d sent %lld bytes where %lld were expected", static_cast<int>(source),
               static_cast<long long>(line.nbytes[number % 2]), static_cast<long long>(nbytes));
      abort(text);
      return false;
    }
    const int64_t length = smaller(nbytes - offset, header_->message_bytes);
    if (length) memcpy(static_cast<char*>(data) + offset, message_of(source, rank_, number), length);
    line.received.store(number + 1);
    ring(source);
    offset += length;
  } while (offset < nbytes);
  return true;
}

} // namespace shuteye
