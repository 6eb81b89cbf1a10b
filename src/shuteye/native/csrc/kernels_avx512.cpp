// The kernels for AVX-512 with bfloat16 products.
#define SHUTEYE_ISA shuteye_avx512
#define SHUTEYE_LANES_AVX512
#include "table.h"

namespace shuteye {
KernelTable avx512_table() {
  KernelTable table = SHUTEYE_ISA::common_table("avx512");
  table.linear[kRowsForm] = table.linear[kPanelsForm] = SHUTEYE_ISA::panel_kernels<SHUTEYE_ISA::Bf16Pairs>();
  SHUTEYE_ISA::add_pairs_of_bfloat16(table);
  return table;
}
} // namespace shuteye
