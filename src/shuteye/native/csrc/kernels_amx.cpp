// The kernels for AMX (tiles of bfloat16), with AVX-512 for the rest.
#define SHUTEYE_ISA shuteye_amx
#define SHUTEYE_LANES_AVX512
#include "attention_amx.h"
#include "attention_joined.h"
#include "linear_tiles.h"
#include "table.h"

namespace SHUTEYE_ISA {

// Fewer tokens are packed by every thread for itself.
constexpr int64_t kPackedTokens = 64;

template <class C, class Few>
void attend_any(const ShuteyeAttention& attention, const AttentionTask& task, const AttentionTask* following, void* memory) {
  if constexpr (__is_same(C, bf16)) {
    if (task.num_kv_heads > 1) return JoinedAttention(attention, task, memory).run(following);
  }
  if (task.num_kv_heads > 1 || AttentionShape(attention, task).rows < kMinTileRows)
    return attend<Few, PairArithmetic>(attention, task, following, memory);
  TileAttention<C>(attention, task, memory).run();
}

// Of models of bfloat16.
inline void add_tiles(shuteye::KernelTable& table) {
  auto& attend = table.attend[SHUTEYE_BFLOAT16];
  attend[SHUTEYE_CACHE_BFLOAT16] = attend_any<bf16, PairArithmetic>;
  attend[SHUTEYE_CACHE_FLOAT16] = attend_any<f16, FloatArithmetic<bf16, f16>>;
  attend[SHUTEYE_CACHE_INT8] = attend_any<i8, Int8Arithmetic<bf16>>;
}

// Tiles for bfloat16, vectors for float.
inline shuteye::LinearKernels tile_kernels() {
  return {[](const Linear& linear) {
            return linear.dtype == SHUTEYE_BFLOAT16 ? tiles_of_sixteen(linear) : panel_kernels<WidenedPairs>().token_tiles(linear);
          },
          [](const Linear& linear, void* prepared, void* scratch, int64_t first, int64_t end) {
            const auto prepare = linear.dtype == SHUTEYE_BFLOAT16 ? pack_tokens : panel_kernels<WidenedPairs>().prepare;
            prepare(linear, prepared, scratch, first, end);
          },
          [](const Linear& linear, const void* prepared, void* scratch, int64_t first, int64_t end) {
            const auto rows = linear.dtype == SHUTEYE_BFLOAT16 ? tile_rows : panel_kernels<WidenedPairs>().rows;
            rows(linear, prepared, scratch, first, end);
          }};
}

} // namespace SHUTEYE_ISA

namespace shuteye {
KernelTable amx_table() {
  KernelTable table = SHUTEYE_ISA::common_table("amx");
  table.linear[kRowsForm] = table.linear[kPanelsForm] = SHUTEYE_ISA::tile_kernels();
  table.least_rows = 4 * SHUTEYE_ISA::kPanelRows; // fewer at a time would read the tokens too often
  table.packed_tokens = SHUTEYE_ISA::kPackedTokens;
  SHUTEYE_ISA::add_tiles(table);
  table.joined_rows = SHUTEYE_ISA::kColumns;
  table.enter = SHUTEYE_ISA::configure_tiles;
  table.leave = SHUTEYE_ISA::release_tiles;
  return table;
}
} // namespace shuteye
