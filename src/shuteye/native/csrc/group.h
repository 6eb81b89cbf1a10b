// One rank's place in a communication group: ranks are processes (or threads, in tests) that share one mapping.
// Knows no file, no process and no model; parallel/group.py makes the mapping, and says what each call means.
//
// Rounds. All ranks of a group enter the same rounds in the same order: a rank writes its slot, says that it has arrived,
// waits until all have, and reads the slots of all. Each has two slots and takes them in turn: whoever enters round n + 1
// has read round n, so that a slot is free again once everybody is in the next round, and one wait per round suffices.
//
// Threads. One thread of a rank at a time may be in a call, but for abort. A thread of the pool (pool.h) may be that one:
// begin() from one thread, then sum() from as many as like, each its share; all have returned before the next begin().
#pragma once
#include <atomic>
#include <cstdint>

#include "types.h"

namespace shuteye {

constexpr int64_t kMaxRanks = 64;

struct RegionHeader;
struct Seat;
struct Channel;
struct Reason;
enum class Op : uint8_t { barrier = 1, reduce, gather };

// Where the parts of a group's memory begin, and how much it needs.
struct Layout {
  int64_t seats, channels, reasons, slots, messages, nbytes;

  explicit Layout(const ShuteyeRegion& region);
};

class Group {
 public:
  // `base`: the mapping, formatted. `rank` may be the group's size: someone who takes no part and may abort it.
  Group(void* base, int64_t rank);

  // Every call that waits: true, or false if the group is aborted, as it is once a wait has outlasted the deadline or the
  // ranks turn out to be in different calls. There is no way back: ranks go on in a new group, of the next epoch.
  bool barrier();
  bool reduce(const ShuteyeReduce& call); // in pieces, if it does not fit a slot
  // Columns of all ranks side by side: out [rows, sum of row_bytes] on rank `to`; out is not used on the others.
  bool gather(const void* part, int64_t rows, const int64_t* row_bytes, int64_t to, void* out);
  bool send(const void* data, int64_t nbytes, int64_t to);
  bool receive(void* data, int64_t nbytes, int64_t source);

  // The steps of `reduce`, for parts [rows, width] that fit a slot: products write slot(), one thread begins, any sum.
  // After a call that returned false nothing may be written to slot(): others may still be reading it.
  bool fits(const ShuteyeReduce& call) const;
  void* slot();
  bool begin(const ShuteyeReduce& call);
  void sum(const ShuteyeReduce& call, int64_t first, int64_t end) const; // elements of [rows, width]

  void abort(const char* reason, uint64_t missing = 0); // the first counts; from any thread
  bool aborted() const;
  bool fault(ShuteyeFault& fault) const; // false: there is none
  void set_timeout(double seconds) { timeout_ns_ = static_cast<int64_t>((seconds < 1e9 ? seconds : 1e9) * 1e9); }

  int64_t rank() const { return rank_; }
  int64_t size() const { return size_; }

 private:
  struct Call { // what a rank has entered a round with
    Op op;
    uint8_t dtype;
    uint16_t to;
    uint32_t rows;
    int64_t width; // elements of a row; gather: bytes
  };
  friend struct Seat;

  Seat& seat(int64_t rank) const;
  Channel& channel(int64_t source, int64_t to) const;
  Reason& reason(int64_t rank) const;
  char* slot_of(int64_t rank, uint64_t round) const;
  char* message_of(int64_t source, int64_t to, uint64_t number) const;
  bool round(const Call& call);
  bool agree(const Call& call);
  void sum_from(const ShuteyeReduce& call, int64_t begin, int64_t first, int64_t end) const;
  uint64_t not_arrived() const;
  template <class Ready, class Missing>
  bool wait(const char* what, const Ready& ready, const Missing& missing);
  template <class Ready>
  bool sleep_until(const Ready& ready, int64_t deadline);
  void outlasted(const char* what, uint64_t missing);
  void ring(int64_t rank);
  void ring_all();

  char* base_;
  RegionHeader* header_;
  Layout layout_;
  int64_t rank_;
  int64_t size_;
  int64_t timeout_ns_ = 60'000'000'000;
  uint64_t round_ = 0; // rounds entered
};

// How many bytes a group of `size` ranks needs; 0 if there cannot be one. Only what is used is ever touched.
int64_t region_bytes(int64_t size, int64_t slot_bytes, int64_t message_bytes);
void format_region(void* base, int64_t size, int64_t epoch, int64_t slot_bytes, int64_t message_bytes); // of zeros
const char* check_region(const void* base, int64_t nbytes); // null, or why it is none of ours
bool take_seat(void* base, int64_t rank); // false: somebody has it

} // namespace shuteye
