// Fills a KernelTable from this translation unit's kernels. Knows nothing of which table will be used.
#pragma once
#include "attention_any.h"
#include "linear_panels.h"
#include "rank_sums.h"

namespace SHUTEYE_ISA {

inline void nothing() {}

#if defined(SHUTEYE_LANES_AVX512) || defined(SHUTEYE_LANES_AVX2)
template <class T>
using FewOfInt8 = Int8Arithmetic<T>;
#else
template <class T>
using FewOfInt8 = FloatArithmetic<T, i8>;
#endif

// Kernels of a model of dtype T over caches of fewer bits than float32, by the dtype of the cache.
template <class T, class Rope, class Attend>
void add_caches(Rope* rope, Attend* own) {
  rope[SHUTEYE_CACHE_BFLOAT16] = rope_heads<T, bf16>;
  rope[SHUTEYE_CACHE_FLOAT16] = rope_heads<T, f16>;
  rope[SHUTEYE_CACHE_INT8] = rope_heads<T, i8>;
  own[SHUTEYE_CACHE_BFLOAT16] = attend<FloatArithmetic<T, bf16>>;
  own[SHUTEYE_CACHE_FLOAT16] = attend<FloatArithmetic<T, f16>, FloatArithmetic<T, float>>;
  own[SHUTEYE_CACHE_INT8] = attend<FewOfInt8<T>, FloatArithmetic<T, float>>;
}

inline shuteye::KernelTable common_table(const char* name) {
  shuteye::KernelTable table{};
  table.name = name;
  table.norm_rows[SHUTEYE_FLOAT32] = norm_rows<float>;
  table.norm_rows[SHUTEYE_BFLOAT16] = norm_rows<bf16>;
  table.silu_mul_rows[SHUTEYE_FLOAT32] = silu_mul_rows<float>;
  table.silu_mul_rows[SHUTEYE_BFLOAT16] = silu_mul_rows<bf16>;
  table.linear[shuteye::kRowsForm] = table.linear[shuteye::kPanelsForm] = panel_kernels<WidenedPairs>();
  table.least_rows = shuteye::kPanelRows;
  table.rope_heads[SHUTEYE_FLOAT32][SHUTEYE_CACHE_FLOAT32] = rope_heads<float, float>;
  table.attend[SHUTEYE_FLOAT32][SHUTEYE_CACHE_FLOAT32] = attend<FloatArithmetic<float>>;
  add_caches<float>(table.rope_heads[SHUTEYE_FLOAT32], table.attend[SHUTEYE_FLOAT32]);
  add_caches<bf16>(table.rope_heads[SHUTEYE_BFLOAT16], table.attend[SHUTEYE_BFLOAT16]);
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
