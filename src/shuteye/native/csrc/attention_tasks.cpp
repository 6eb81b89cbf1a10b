// See attention_tasks.h.
#include "attention_tasks.h"

namespace shuteye {
namespace {

template <class T>
T smaller(T left, T right) {
  return left < right ? left : right;
}

template <class T>
T larger(T left, T right) {
  return left > right ? left : right;
}

// The size of the parts if `count` is cut into as few as possible of at most `most`, all alike.
int64_t even_share(int64_t count, int64_t most) {
  const int64_t num_parts = (count + most - 1) / most;
  return (count + num_parts - 1) / num_parts;
}

} // namespace

void AttentionTasks::add_tile(const AttentionTask& tile, int64_t rows, int64_t head_dim) {
  const int64_t context = tile.first_position + tile.num_tokens;
  const int64_t num_parts = rows <= kMaxSplitRows * tile.num_kv_heads ? (context + part_keys_ - 1) / part_keys_ : 1;
  const int64_t first_task = size();
  for (int64_t part = 0; part < num_parts; part++) {
    AttentionTask task = tile;
    task.key_begin = num_parts > 1 ? part * part_keys_ : 0;
    task.key_end = num_parts > 1 ? smaller(context, (part + 1) * part_keys_) : context;
    tasks_.push_back(task);
    parts_.push_back({first_task, num_parts, num_tiles_});
  }
  if (num_parts == 1) return;
  num_tiles_++;
  partials_.resize(partials_.size() + num_parts * partial_floats(rows, head_dim));
}

void AttentionTasks::plan(const ShuteyeSequences& sequences, const ShuteyeCache& cache, int64_t num_heads,
                          int64_t joined_heads) {
  tasks_.clear();
  parts_.clear();
  partials_.clear();
  num_tiles_ = 0;
  part_keys_ = sequences.num_sequences * cache.num_kv_heads < kEnoughTiles ? kPartKeys : kLongPartKeys;
  const int64_t group = num_heads / cache.num_kv_heads;
  const int64_t most_tokens = larger(int64_t{1}, kMaxAttentionRows / group);
  for (int64_t sequence = 0; sequence < sequences.num_sequences; sequence++) {
    const int64_t first = sequences.query_starts[sequence], end = sequences.query_starts[sequence + 1];
    const int64_t start = sequences.context_lengths[sequence] - (end - first);
    const int64_t tile_tokens = even_share(end - first, most_tokens);
    const int64_t joined = end - first == 1 ? smaller(joined_heads, most_tokens) : 1;
    for (int64_t head = 0; head < cache.num_kv_heads; head += joined) { // a head's tiles one after the other: its keys stay near
      const int64_t heads = smaller(joined, cache.num_kv_heads - head);
      for (int64_t tile_end = end; tile_end > first; tile_end -= tile_tokens) { // the last see most keys: short ones at the end
        const int64_t token = larger(first, tile_end - tile_tokens), count = tile_end - token;
        add_tile({sequence, token, count, start + token - first, head, heads, 0, 0, nullptr}, count * heads * group,
                 cache.head_dim);
      }
    }
  }
  float* partial = partials_.data(); // only now at rest
  for (int64_t index = 0; index < size(); index++) {
    if (parts_[index].num_parts == 1) continue;
    tasks_[index].partial = partial;
    partial += partial_floats(tasks_[index].num_tokens * tasks_[index].num_kv_heads * group, cache.head_dim);
  }
  if (num_tiles_ > num_counters_) {
    num_counters_ = 2 * num_tiles_;
    finished_.reset(new std::atomic<int64_t>[num_counters_]());
  }
}

void AttentionTasks::run(const KernelTable& table, const ShuteyeAttention& attention, void* scratch, int64_t first,
                         int64_t end) {
  for (int64_t index = first; index < end; index++) {
    const AttentionTask* following = index + 1 < size() ? &tasks_[index + 1] : nullptr;
    table.attend[attention.dtype][attention.cache.dtype](attention, tasks_[index], following, scratch);
    const Part& part = parts_[index];
    if (part.num_parts == 1) continue;
    std::atomic<int64_t>& finished = finished_[part.tile];
    if (finished.fetch_add(1, std::memory_order_acq_rel) + 1 < part.num_parts) continue;
    finished.store(0, std::memory_order_relaxed); // published by the phase's own counter
    table.merge[attention.dtype](attention, tasks_[part.first_task], part.num_parts);
  }
}

} // namespace shuteye
