// See embedding.h.
#include "embedding.h"

#include <cstring>

namespace shuteye {
namespace {

// A row of panels, whose pairs of columns lie apart.
template <class T>
void gather_row(const ShuteyeMatrix& matrix, int64_t row, T* out) {
  const int64_t pairs = round_up(matrix.columns, kDepthStep) / 2;
  const auto* pair = static_cast<const uint16_t*>(matrix.data) + 2 * (row / kPanelRows * pairs * kPanelRows + row % kPanelRows);
  for (int64_t column = 0; column < matrix.columns; column++) {
    const uint16_t half = pair[column / 2 * 2 * kPanelRows + column % 2];
    if constexpr (sizeof(T) == sizeof half) {
      out[column] = half;
    } else {
      const uint32_t bits = static_cast<uint32_t>(half) << 16;
      memcpy(out + column, &bits, sizeof bits);
    }
  }
}

} // namespace

void embed_row(const KernelTable& table, int64_t dtype, const ShuteyeMatrix& matrix, int64_t row, void* out) {
  const bool halves = dtype == SHUTEYE_BFLOAT16;
  const int64_t nbytes = matrix.columns * (halves ? 2 : 4);
  switch (form_of(matrix.kind)) {
    case kRowsForm: memcpy(out, static_cast<const char*>(matrix.data) + row * nbytes, nbytes); return;
    case kPanelsForm:
      return halves ? gather_row(matrix, row, static_cast<uint16_t*>(out)) : gather_row(matrix, row, static_cast<float*>(out));
    default: return table.dequantize_row[dtype](matrix, row, out);
  }
}

} // namespace shuteye
