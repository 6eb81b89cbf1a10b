// Fills a KernelTable from this translation unit's kernels. Knows nothing of which table will be used.
#pragma once
#include "attention_any.h"
#include "linear.h"
#include "rank_sums.h"

namespace SHUTEYE_ISA {

inline void prepare_float(const Linear& linear, void* memory) {
  const Scratch scratch(linear, memory);
  linear.dtype == SHUTEYE_BFLOAT16 ? prepare_rows<FloatDot<bf16>>(linear, scratch)
                                   : prepare_rows<FloatDot<float>>(linear, scratch);
}

inline void linear_float(const Linear& linear, void* memory, int64_t first_row, int64_t end_row) {
  const Scratch scratch(linear, memory);
  if (linear.dtype == SHUTEYE_BFLOAT16) {
    each_tile<bf16>(linear, scratch, first_row, end_row, compute_tile<FloatDot<bf16>>);
  } else {
    each_tile<float>(linear, scratch, first_row, end_row, compute_tile<FloatDot<float>>);
  }
}

inline void nothing() {}

inline shuteye::KernelTable common_table(const char* name) {
  shuteye::KernelTable table{};
  table.name = name;
  table.norm_rows[SHUTEYE_FLOAT32] = norm_rows<float>;
  table.norm_rows[SHUTEYE_BFLOAT16] = norm_rows<bf16>;
  table.silu_mul_rows[SHUTEYE_FLOAT32] = silu_mul_rows<float>;
  table.silu_mul_rows[SHUTEYE_BFLOAT16] = silu_mul_rows<bf16>;
  table.prepare = prepare_float;
  table.linear_rows = linear_float;
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
