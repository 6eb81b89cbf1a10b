// Fills a KernelTable from this translation unit's kernels. Knows nothing of which table will be used.
#pragma once
#include "attention_any.h"
#include "linear_panels.h"
#include "rank_sums.h"

namespace SHUTEYE_ISA {

inline void nothing() {}

inline shuteye::KernelTable common_table(const char* name) {
  shuteye::KernelTable table{};
  table.name = name;
  table.norm_rows[SHUTEYE_FLOAT32] = norm_rows<float>;
  table.norm_rows[SHUTEYE_BFLOAT16] = norm_rows<bf16>;
  table.silu_mul_rows[SHUTEYE_FLOAT32] = silu_mul_rows<float>;
  table.silu_mul_rows[SHUTEYE_BFLOAT16] = silu_mul_rows<bf16>;
  table.linear[shuteye::kRowsForm] = table.linear[shuteye::kPanelsForm] = panel_kernels<WidenedPairs>();
  table.least_rows = shuteye::kPanelRows;
  table.rope_heads[SHUTEYE_FLOAT32] = rope_heads<float>;
  table.rope_heads[SHUTEYE_BFLOAT16] = rope_heads<bf16>;
  table.attend[SHUTEYE_FLOAT32] = attend<FloatArithmetic<float>>;
  table.attend[SHUTEYE_BFLOAT16] = attend<FloatArithmetic<bf16>>;
  table.merge[SHUTEYE_FLOAT32] = merge<float>;
  table.merge[SHUTEYE_BFLOAT16] = merge<bf16>;
  table.sum_ranks[SHUTEYE_FLOAT32][SHUTEYE_FLOAT32] = sum_ranks<float, float>;
  table.sum_ranks[SHUTEYE_FLOAT32][SHUTEYE_BFLOAT16] = sum_ranks<float, bf16>;
  table.sum_ranks[SHUTEYE_BFLOAT16][SHUTEYE_FLOAT32] = sum_ranks<bf16, float>;
  table.sum_ranks[SHUTEYE_BFLOAT16][SHUTEYE_BFLOAT16] = sum_ranks<bf16, bf16>;
  table.joined_bytes = kJoinedBytes;
  table.enter = nothing;
  table.leave = nothing;
  return table;
}

} // namespace SHUTEYE_ISA
