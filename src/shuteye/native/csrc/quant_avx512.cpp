// Quantized matrices with AVX-512 VNNI.
#define SHUTEYE_ISA shuteye_quant_avx512
#define SHUTEYE_LANES_AVX512
#include "quant.h"

namespace shuteye {
void add_quant_avx512(KernelTable& table) { SHUTEYE_ISA::fill_table(table); }
} // namespace shuteye
