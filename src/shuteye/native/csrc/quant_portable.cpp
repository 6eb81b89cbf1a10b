// Quantized matrices on any CPU.
#define SHUTEYE_ISA shuteye_quant_portable
#include "quant.h"

namespace shuteye {
void add_quant_portable(KernelTable& table) { SHUTEYE_ISA::fill_table(table); }
} // namespace shuteye
