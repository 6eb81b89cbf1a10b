// The kernels for any CPU.
#define SHUTEYE_ISA shuteye_portable
#include "table.h"

namespace shuteye {
KernelTable portable_table() { return shuteye_portable::common_table("portable"); }
} // namespace shuteye
