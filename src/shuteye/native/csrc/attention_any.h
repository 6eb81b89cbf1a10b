// Attention of a task by whichever of the kernels suits its rows. Knows nothing of threads.
#pragma once
#include "attention_few.h"
#include "attention_int8.h"
#include "attention_many.h"

namespace SHUTEYE_ISA {

// Few: reads the cache as it is; Many: the arithmetic of many rows, for which it may be expanded.
template <class Few, class Many = Few>
void attend(const ShuteyeAttention& attention, const AttentionTask& task, const AttentionTask* following, void* memory) {
  const AttentionShape shape(attention, task);
  if (task.num_kv_heads > 1 || shape.rows < kMinManyRows) return FewRows<Few>(attention, task, memory).run(following);
  ManyRows<Many, typename Few::Element>(attention, task, memory).run();
}

#if defined(SHUTEYE_LANES_AVX512)
// Of models of bfloat16: products of many rows are of pairs of it, whatever the cache holds.
inline void add_pairs_of_bfloat16(shuteye::KernelTable& table) {
  auto& own = table.attend[SHUTEYE_BFLOAT16];
  own[SHUTEYE_CACHE_BFLOAT16] = attend<PairArithmetic>;
  own[SHUTEYE_CACHE_FLOAT16] = attend<FloatArithmetic<bf16, f16>, PairArithmetic>;
  own[SHUTEYE_CACHE_INT8] = attend<Int8Arithmetic<bf16>, PairArithmetic>;
}
#endif

} // namespace SHUTEYE_ISA
