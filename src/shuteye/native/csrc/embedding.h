// Rows of an embedding of any kind. Knows no thread.
#pragma once
#include "kernel_table.h"

namespace shuteye {

// out: [columns] of the model's dtype.
void embed_row(const KernelTable& table, int64_t dtype, const ShuteyeMatrix& matrix, int64_t row, void* out);

} // namespace shuteye
