// The C ABI that library.py calls. Knows no kernel; every call is safe from any thread, one job runs at a time.
#include <atomic>
#include <memory>
#include <vector>

#include "decoder.h"
#include "embedding.h"
#include "group.h"

namespace shuteye {
const char* check_sequences(const ShuteyeSequences& sequences, const ShuteyeCache& cache, int64_t num_tokens);
}

using namespace shuteye;

namespace {

// One phase over `units`, each piece given scratch of its thread.
template <class Body>
void share(int64_t units, int64_t scratch_bytes, const Body& body) {
  struct Job {
    Phase phase;
    int64_t units;
    int num_threads;
    std::vector<std::unique_ptr<char[]>> scratch;
    const Body* body;
    const KernelTable* table;
  };
  Job job;
  job.units = units;
  job.num_threads = pool_num_threads();
  for (int thread = 0; thread < job.num_threads; thread++) job.scratch.emplace_back(new char[scratch_bytes + 64]);
  job.body = &body;
  job.table = &active_table();
  const auto work = [](void* context, int thread) {
    Job& job = *static_cast<Job*>(context);
    if (thread >= job.num_threads) return;
    void* scratch = reinterpret_cast<void*>(round_up(reinterpret_cast<int64_t>(job.scratch[thread].get()), 64));
    job.table->enter();
    job.phase.run(job.units, job.num_threads,
                  [&](int64_t first, int64_t end) { (*job.body)(*job.table, scratch, first, end); });
    job.table->leave();
  };
  pool_run(work, &job);
}

} // namespace

#pragma GCC visibility push(default)
extern "C" {

int64_t shuteye_abi_version() { return 6; }
int64_t shuteye_level_supported(int64_t level) { return level_supported(level); }
int64_t shuteye_level() { return active_level(); }
int64_t shuteye_set_level(int64_t level) { return select_level(level); }
int64_t shuteye_num_threads() { return pool_num_threads(); }
void shuteye_set_num_threads(int64_t count) { pool_set_num_threads(static_cast<int>(count < 1 ? 1 : count)); }
void shuteye_stop() { pool_stop(); }

void* shuteye_decoder_create(const ShuteyeModel* model) { return new Decoder(*model); }
void shuteye_decoder_destroy(void* decoder) { delete static_cast<Decoder*>(decoder); }
const char* shuteye_decoder_run(void* decoder, ShuteyeStep* step) {
  return static_cast<Decoder*>(decoder)->run(*step);
}

int64_t shuteye_region_bytes(int64_t size, int64_t slot_bytes, int64_t message_bytes) {
  return region_bytes(size, slot_bytes, message_bytes);
}
void shuteye_region_format(void* base, int64_t size, int64_t epoch, int64_t slot_bytes, int64_t message_bytes) {
  format_region(base, size, epoch, slot_bytes, message_bytes);
}
const char* shuteye_region_check(const void* base, int64_t nbytes) { return check_region(base, nbytes); }
int64_t shuteye_region_take_seat(void* base, int64_t rank) { return take_seat(base, rank); }

void* shuteye_group_create(void* base, int64_t rank) { return new Group(base, rank); }
void shuteye_group_destroy(void* group) { delete static_cast<Group*>(group); }
void shuteye_group_set_timeout(void* group, double seconds) { static_cast<Group*>(group)->set_timeout(seconds); }
void shuteye_group_abort(void* group, const char* reason) { static_cast<Group*>(group)->abort(reason); }
int64_t shuteye_group_fault(void* group, ShuteyeFault* fault) { return static_cast<Group*>(group)->fault(*fault); }
int64_t shuteye_group_barrier(void* group) { return static_cast<Group*>(group)->barrier(); }
int64_t shuteye_group_reduce(void* group, const ShuteyeReduce* call) {
  return static_cast<Group*>(group)->reduce(*call);
}
int64_t shuteye_group_gather(void* group, const void* part, int64_t rows, const int64_t* row_bytes, int64_t to,
                             void* out) {
  return static_cast<Group*>(group)->gather(part, rows, row_bytes, to, out);
}
int64_t shuteye_group_send(void* group, const void* data, int64_t nbytes, int64_t to) {
  return static_cast<Group*>(group)->send(data, nbytes, to);
}
int64_t shuteye_group_receive(void* group, void* data, int64_t nbytes, int64_t source) {
  return static_cast<Group*>(group)->receive(data, nbytes, source);
}

// Reads memory and does nothing else: the floor that benchmarks compare with.
int64_t shuteye_read(const void* memory, int64_t nbytes) {
  constexpr int64_t kChunkWords = 32768;
  const auto* words = static_cast<const uint64_t*>(memory);
  std::atomic<uint64_t> total{0};
  share(nbytes / 8 / kChunkWords, 0, [&](const KernelTable&, void*, int64_t first, int64_t end) {
    uint64_t sum[8] = {};
    for (const uint64_t* word = words + first * kChunkWords; word < words + end * kChunkWords; word += 8) {
      __builtin_prefetch(word + 512);
      for (int lane = 0; lane < 8; lane++) sum[lane] ^= word[lane];
    }
    for (const uint64_t each : sum) total += each;
  });
  return static_cast<int64_t>(total.load());
}

void shuteye_rms_norm(int64_t dtype, const void* x, const void* weight, double eps, void* out, int64_t rows,
                      int64_t width) {
  const int64_t row_bytes = width * (dtype == SHUTEYE_BFLOAT16 ? 2 : 4);
  share(rows, 0, [&](const KernelTable& table, void*, int64_t first, int64_t end) {
    table.norm_rows[dtype](static_cast<const char*>(x) + first * row_bytes, weight, static_cast<float>(eps),
                           static_cast<char*>(out) + first * row_bytes, end - first, width);
  });
}

void shuteye_silu_mul(int64_t dtype, const void* gate_up, void* out, int64_t rows, int64_t width) {
  const int64_t row_bytes = width * (dtype == SHUTEYE_BFLOAT16 ? 2 : 4);
  share(rows, 0, [&](const KernelTable& table, void*, int64_t first, int64_t end) {
    table.silu_mul_rows[dtype](static_cast<const char*>(gate_up) + first * 2 * row_bytes,
                               static_cast<char*>(out) + first * row_bytes, end - first, width);
  });
}

void shuteye_linear(int64_t dtype, const void* x, const ShuteyeMatrix* weight, void* out, int64_t num_tokens) {
  Linear linear{};
  linear.dtype = dtype;
  linear.num_tokens = num_tokens;
  linear.in_features = weight->columns;
  linear.out_features = weight->rows;
  linear.x = x;
  linear.weight = *weight;
  linear.out = out;
  linear.out_stride = weight->rows;
  linear.finish = Finish::store;
  const Form form = form_of(weight->kind);
  const std::unique_ptr<char[]> memory(new char[prepared_bytes(num_tokens, weight->columns) + 64]);
  void* prepared = reinterpret_cast<void*>(round_up(reinterpret_cast<int64_t>(memory.get()), 64));
  const int64_t scratch_bytes = linear_scratch_bytes(num_tokens, weight->columns);
  share(active_table().linear[form].token_tiles(linear), scratch_bytes,
        [&](const KernelTable& table, void* scratch, int64_t first, int64_t end) {
          table.linear[form].prepare(linear, prepared, scratch, first, end);
        });
  const int64_t rows = share_rows(weight->kind);
  share((weight->rows + rows - 1) / rows, scratch_bytes,
        [&](const KernelTable& table, void* scratch, int64_t first, int64_t end) {
          const int64_t end_row = end * rows < weight->rows ? end * rows : weight->rows;
          table.linear[form].rows(linear, prepared, scratch, first * rows, end_row);
        });
}

void shuteye_embed(int64_t dtype, const ShuteyeMatrix* matrix, const int64_t* token_ids, int64_t count, void* out) {
  const int64_t nbytes = matrix->columns * (dtype == SHUTEYE_BFLOAT16 ? 2 : 4);
  share(count, 0, [&](const KernelTable& table, void*, int64_t first, int64_t end) {
    for (int64_t token = first; token < end; token++)
      embed_row(table, dtype, *matrix, token_ids[token], static_cast<char*>(out) + token * nbytes);
  });
}

void shuteye_rope_and_write(const ShuteyeRope* rope) {
  share(rope->num_heads + 2 * rope->cache.num_kv_heads, 0,
        [&](const KernelTable& table, void*, int64_t first, int64_t end) {
          table.rope_heads[rope->dtype][rope->cache.dtype](*rope, first, end);
        });
}

const char* shuteye_paged_attention(const ShuteyeAttention* attention, int64_t num_tokens) {
  if (const char* wrong = check_sequences(attention->sequences, attention->cache, num_tokens)) return wrong;
  AttentionTasks tasks;
  const int64_t group = attention->num_heads / attention->cache.num_kv_heads;
  const int64_t joined_heads = active_table().joined_heads(attention->dtype, attention->cache, group);
  tasks.plan(attention->sequences, attention->cache, attention->num_heads, joined_heads);
  share(tasks.size(), attention_scratch_bytes(attention->cache.head_dim),
        [&](const KernelTable& table, void* scratch, int64_t first, int64_t end) {
          tasks.run(table, *attention, scratch, first, end);
        });
  return nullptr;
}
}
#pragma GCC visibility pop
