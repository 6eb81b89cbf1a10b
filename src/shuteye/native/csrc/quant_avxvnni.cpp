// Quantized matrices with AVX2 and AVX-VNNI.
#define SHUTEYE_ISA shuteye_quant_avxvnni
#define SHUTEYE_LANES_AVX2
#define SHUTEYE_AVXVNNI
#include "quant.h"

namespace shuteye {
void add_quant_avxvnni(KernelTable& table) { SHUTEYE_ISA::fill_table(table); }
} // namespace shuteye
