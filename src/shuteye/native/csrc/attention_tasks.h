// Cuts the attention of a step into tasks. Knows no instruction set; the cut depends on the batch alone, never on the
// number of threads, so that results do not either.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernel_table.h"

namespace shuteye {

// Contexts of few rows are cut into parts of this many keys, merged by whoever finishes the last of them; into longer
// ones where there are enough (sequence, KV head) pairs without.
constexpr int64_t kPartKeys = 256;
constexpr int64_t kLongPartKeys = 2048;
constexpr int64_t kEnoughTiles = 24;
constexpr int64_t kMaxSplitRows = 16;

class AttentionTasks {
 public:
  // `joined_heads`: so many KV heads of one token are one task.
  void plan(const ShuteyeSequences& sequences, const ShuteyeCache& cache, int64_t num_heads, int64_t joined_heads);
  int64_t size() const { return static_cast<int64_t>(tasks_.size()); }

  // Runs tasks [first, end) and the merges that become due. Every task must be run once per use.
  void run(const KernelTable& table, const ShuteyeAttention& attention, void* scratch, int64_t first, int64_t end);

 private:
  struct Part {
    int64_t first_task; // of its tile
    int64_t num_parts;
    int64_t tile; // index of its counter
  };

  void add_tile(const AttentionTask& tile, int64_t rows, int64_t head_dim);

  std::vector<AttentionTask> tasks_;
  std::vector<Part> parts_; // one per task
  std::vector<float> partials_;
  std::unique_ptr<std::atomic<int64_t>[]> finished_; // per split tile, back at 0 after each merge
  int64_t part_keys_ = kPartKeys;
  int64_t num_tiles_ = 0;
  int64_t num_counters_ = 0;
};

} // namespace shuteye
