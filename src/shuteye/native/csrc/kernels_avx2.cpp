// The kernels for AVX2 with FMA.
#define SHUTEYE_ISA shuteye_avx2
#define SHUTEYE_LANES_AVX2
#include "table.h"

namespace shuteye {
KernelTable avx2_table() { return shuteye_avx2::common_table("avx2"); }
} // namespace shuteye
