// Quantized matrices with AVX2.
#define SHUTEYE_ISA shuteye_quant_avx2
#define SHUTEYE_LANES_AVX2
#include "quant.h"

namespace shuteye {
void add_quant_avx2(KernelTable& table) { SHUTEYE_ISA::fill_table(table); }
} // namespace shuteye
