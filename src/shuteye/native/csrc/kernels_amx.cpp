// The kernels for AMX (tiles of bfloat16), with AVX-512 for the rest.
#define SHUTEYE_ISA shuteye_amx
#define SHUTEYE_LANES_AVX512
#include "attention_amx.h"
#include "attention_joined.h"
#include "linear_amx.h"
#include "linear_many.h"
#include "table.h"

namespace SHUTEYE_ISA {

// Fewer tokens leave most of a tile empty: the vector unit is as fast.
constexpr int64_t kMinTokens = 4;

// Packing weights costs as much as multiplying them with so many tokens.
constexpr int64_t kManyTokens = 64;

inline void attend_any(const ShuteyeAttention& attention, const AttentionTask& task, const AttentionTask* following, void* memory) {
  if (task.num_kv_heads > 1) return JoinedAttention(attention, task, memory).run(following);
  if (AttentionShape(attention, task).rows < kMinTileRows) return attend<PairArithmetic>(attention, task, following, memory);
  TileAttention(attention, task, memory).run();
}

inline void prepare_any(const Linear& linear, void* memory) {
  if (linear.dtype != SHUTEYE_BFLOAT16) return prepare_float(linear, memory);
  linear.num_tokens < kMinTokens ? prepare_rows<PairDot>(linear, Scratch(linear, memory))
                                 : prepare_tiles(linear, Scratch(linear, memory));
}

inline void linear_any(const Linear& linear, void* memory, int64_t first_row, int64_t end_row) {
  if (linear.dtype != SHUTEYE_BFLOAT16) return linear_float(linear, memory, first_row, end_row);
  each_tile<bf16>(linear, Scratch(linear, memory), first_row, end_row,
                  linear.num_tokens < kMinTokens ? compute_tile<PairDot> : compute_with_tiles);
}

} // namespace SHUTEYE_ISA

namespace shuteye {
KernelTable amx_table() {
  KernelTable table = SHUTEYE_ISA::common_table("amx");
  table.prepare = SHUTEYE_ISA::prepare_any;
  table.linear_rows = SHUTEYE_ISA::linear_any;
  table.many_tokens = SHUTEYE_ISA::kManyTokens;
  table.pack_tokens = SHUTEYE_ISA::pack_tokens;
  table.many_rows = SHUTEYE_ISA::many_rows;
  table.attend[SHUTEYE_BFLOAT16] = SHUTEYE_ISA::attend_any;
  table.joined_rows = SHUTEYE_ISA::kColumns;
  table.enter = SHUTEYE_ISA::configure_tiles;
  table.leave = SHUTEYE_ISA::release_tiles;
  return table;
}
} // namespace shuteye
