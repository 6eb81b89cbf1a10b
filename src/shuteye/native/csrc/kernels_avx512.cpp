// The kernels for AVX-512 with bfloat16 products.
#define SHUTEYE_ISA shuteye_avx512
#define SHUTEYE_LANES_AVX512
#include "table.h"

namespace SHUTEYE_ISA {

inline void prepare_pairs(const Linear& linear, void* memory) {
  if (linear.dtype != SHUTEYE_BFLOAT16) return prepare_float(linear, memory);
  prepare_rows<PairDot>(linear, Scratch(linear, memory));
}

inline void linear_pairs(const Linear& linear, void* memory, int64_t first_row, int64_t end_row) {
  if (linear.dtype != SHUTEYE_BFLOAT16) return linear_float(linear, memory, first_row, end_row);
  each_tile<bf16>(linear, Scratch(linear, memory), first_row, end_row, compute_tile<PairDot>);
}

} // namespace SHUTEYE_ISA

namespace shuteye {
KernelTable avx512_table() {
  KernelTable table = SHUTEYE_ISA::common_table("avx512");
  table.prepare = SHUTEYE_ISA::prepare_pairs;
  table.linear_rows = SHUTEYE_ISA::linear_pairs;
  table.attend[SHUTEYE_BFLOAT16] = SHUTEYE_ISA::attend<SHUTEYE_ISA::PairArithmetic>;
  return table;
}
} // namespace shuteye
