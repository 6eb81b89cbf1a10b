// The kernels of one instruction set as a table of functions. Knows no threads: callers split the work.
#pragma once
#include "types.h"

namespace shuteye {

constexpr int64_t kTileRows = 16; // rows of a row-major matrix that are computed together; of a quantized panel
constexpr int64_t kPanelRows = 32; // of a panel of bfloat16
constexpr int64_t kDepthStep = 32;
constexpr int64_t kGroupPanels = 8;    // of AMX: panels that are computed together
constexpr int64_t kMaxChunkSteps = 20; // likewise: depth steps of many tokens that are multiplied at a time

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

enum class Finish {
  store,       // out = y
  store_float, // out = y, rounded to the model's type, as float
  store_part,  // out = y as float, not rounded: the ranks' parts are still to be added
  add,         // out = residual + y
  silu_mul,    // out = silu(y of row i) * (y of row i + out_features)
};

// y = x @ weight^T + bias. Tokens are prepared once, then any rows of weight are computed.
struct Linear {
  int64_t dtype;
  int64_t num_tokens;
  int64_t in_features;
  int64_t out_features; // of out
  const void* x;        // [*, in_features]
  const int64_t* rows;  // [num_tokens], which rows of x and of residual are meant; null: the first ones
  const void* norm;     // [in_features]: x is normalised first; null: it is not
  float eps;
  ShuteyeMatrix weight; // [out_features, in_features]
  ShuteyeMatrix upper;  // of silu_mul: likewise, of the same form
  const void* residual;
  void* out; // [num_tokens, out_stride]
  int64_t out_stride;
  Finish finish;
  bool x_is_packed; // as `packed_offset` says: of all tokens, without a norm
  bool packs_out;   // likewise, for the next product
};

// Kinds of matrices that the same kernels read, which want tokens prepared in the same way.
enum Form : int64_t { kRowsForm = 0, kPanelsForm = 1, kQuantForm = 2, kNumForms = 3 };

inline Form form_of(int64_t kind) {
  return kind == SHUTEYE_ROWS ? kRowsForm : kind == SHUTEYE_BF16 ? kPanelsForm : kQuantForm;
}

// The rows that shares of a product begin at multiples of.
inline int64_t share_rows(int64_t kind) { return form_of(kind) == kQuantForm ? kTileRows : kPanelRows; }

// The kernels of one form. `scratch` is the calling thread's own, of `linear_scratch_bytes`.
struct LinearKernels {
  int64_t (*token_tiles)(const Linear& linear); // how many tiles its tokens are cut into
  // Writes tiles [first_tile, end_tile) of the tokens to `prepared`, [prepared_bytes], which all threads may share.
  void (*prepare)(const Linear& linear, void* prepared, void* scratch, int64_t first_tile, int64_t end_tile);
  void (*rows)(const Linear& linear, const void* prepared, void* scratch, int64_t first_row, int64_t end_row);
};

// A tile of queries of one sequence, for one KV head or several, over all or a part of their context.
struct AttentionTask {
  int64_t sequence;
  int64_t first_token; // in the step
  int64_t num_tokens;
  int64_t first_position; // of first_token in its sequence
  int64_t kv_head;      // the first
  int64_t num_kv_heads; // more than one only for one token, and where KernelTable::joined_rows_of allows it
  int64_t key_begin; // this task sees keys of [key_begin, key_end) only
  int64_t key_end;
  float* partial; // null: writes the result; else [rows, head_dim + 2] sums, maxima and totals to be merged
};

// Elements of a reduce over ranks. Parts begin at element `begin` of [rows, width].
struct RankSums {
  const ShuteyeReduce* call;
  const void* const* parts;
  int64_t num_parts;
  int64_t begin;
};

constexpr int64_t kMaxAttentionRows = 384; // (token, head) rows per task: keys and values are packed once for all
constexpr int64_t kKeySpan = 64;   // keys per round of the online softmax, in tiles of AMX
constexpr int64_t kManySpan = 256; // of many rows elsewhere: what begins and ends with a round then hardly counts
constexpr int64_t kNumCacheDtypes = 4;
constexpr int64_t kCacheBytes[kNumCacheDtypes] = {4, 2, 2, 1}; // of a number in a cache of each dtype

struct KernelTable {
  const char* name;
  void (*norm_rows[2])(const void* x, const void* weight, float eps, void* out, int64_t rows, int64_t width);
  void (*silu_mul_rows[2])(const void* gate_up, void* out, int64_t rows, int64_t width);
  LinearKernels linear[kNumForms];
  int64_t least_rows; // that a thread takes of a product of many tokens
  void (*dequantize_row[2])(const ShuteyeMatrix& matrix, int64_t row, void* out); // [columns] of the model's dtype
  int64_t packed_tokens; // from so many on, tokens of bfloat16 are prepared as `packed_offset` says; 0: never
  void (*rope_heads[2][kNumCacheDtypes])(const ShuteyeRope& rope, int64_t first_head, int64_t end_head);
  // [dtype][dtype of the cache]; `following`: the task that is likely to be next, or null; what it needs may be fetched ahead.
  void (*attend[2][kNumCacheDtypes])(const ShuteyeAttention& attention, const AttentionTask& task,
                                     const AttentionTask* following, void* scratch);
  void (*merge[2])(const ShuteyeAttention& attention, const AttentionTask& task, int64_t num_parts);
  void (*sum_ranks[2][2])(const RankSums& sums, int64_t first, int64_t end); // [dtype][part_dtype]; elements
  int64_t joined_bytes; // attend takes several KV heads of one token, as many as have so many bytes of a key
  int64_t joined_rows;  // not 0: of a cache of bfloat16, as many as have no more rows together
  void (*enter)(); // per thread, around a job
  void (*leave)();

  // Whether whoever makes x may write it as it is prepared.
  bool takes_packed(const Linear& linear) const {
    return packed_tokens && linear.num_tokens >= packed_tokens && linear.dtype == SHUTEYE_BFLOAT16 &&
           form_of(linear.weight.kind) != kQuantForm;
  }
  // KV heads of one token that are best one task: their keys lie side by side.
  int64_t joined_heads(int64_t dtype, const ShuteyeCache& cache, int64_t group) const {
    const int64_t key_bytes = cache.head_dim * kCacheBytes[cache.dtype];
    const bool by_tiles = joined_rows && dtype == SHUTEYE_BFLOAT16 && cache.dtype == SHUTEYE_CACHE_BFLOAT16;
    if (!by_tiles) return joined_bytes > key_bytes ? joined_bytes / key_bytes : 1;
    const bool fits = cache.block_size % 16 == 0 && cache.head_dim % kDepthStep == 0 && joined_rows > group;
    return fits ? joined_rows / group : 1;
  }
};

// Enough for what any form makes of its tokens.
inline int64_t prepared_bytes(int64_t num_tokens, int64_t in_features) {
  return round_up(num_tokens, 16) * round_up(in_features, kDepthStep) * 4;
}

// Packed tokens are tiles of 16 tokens by 32 features: [tokens / 16][features / 32][16][32]. Features must fill their tiles
// where a step writes packed tokens; those of the last tile that are no tokens hold anything then.
inline int64_t packed_offset(int64_t token, int64_t feature, int64_t num_features) {
  return (token / 16 * (num_features / 32) + feature / 32) * 512 + token % 16 * 32 + feature % 32;
}

// Enough for prepare and rows of any form: six tokens of float, or twelve of bfloat16; then two panels' sums and a chunk of
// weights, or AMX's weights and sums.
inline int64_t linear_scratch_bytes(int64_t num_tokens, int64_t in_features) {
  const int64_t rows_of_tokens = round_up(in_features, kDepthStep) * 6 * 4;
  const int64_t sums = round_up(num_tokens, 2 * 16) * kGroupPanels * kPanelRows * 4;
  const int64_t rows = kGroupPanels * kMaxChunkSteps * 2048 + sums;
  return (rows_of_tokens > rows ? rows_of_tokens : rows) + 8192;
}

// Enough for AMX, and for many rows by panels: sums and queries; keys, values and what a cache of others becomes; scores.
inline int64_t attention_scratch_bytes(int64_t head_dim) {
  const int64_t depth = round_up(head_dim, kDepthStep);
  const int64_t tiles = kMaxAttentionRows * (3 * depth + 2 * kKeySpan + 24);
  const int64_t panels = kMaxAttentionRows * (2 * depth + 24) + kManySpan * (4 * depth + 24);
  return (tiles > panels ? tiles : panels) * 4 + 8192;
}

inline int64_t partial_floats(int64_t rows, int64_t head_dim) { return rows * (head_dim + 2); }

enum Level : int64_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3, kNumLevels = 4 };

bool level_supported(int64_t level);
const KernelTable& active_table();
int64_t active_level();
bool select_level(int64_t level);

} // namespace shuteye
