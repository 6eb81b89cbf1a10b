// Attention of a task by whichever of the kernels suits its rows. Knows nothing of threads.
#pragma once
#include "attention_few.h"
#include "attention_many.h"

namespace SHUTEYE_ISA {

template <class A>
void attend(const ShuteyeAttention& attention, const AttentionTask& task, const AttentionTask* following, void* memory) {
  const AttentionShape shape(attention, task);
  if (task.num_kv_heads > 1 || shape.rows < kMinManyRows) return FewRows<A>(attention, task, memory).run(following);
  ManyRows<A>(attention, task, memory).run();
}

} // namespace SHUTEYE_ISA
