// The parts of all ranks, added in rank order. Knows nothing of where they come from.
//
// Additions and roundings only, in one order for every element: however the elements are shared out, the bits are the same.
// So they are at any instruction set, but for denormals, which AVX-512's own rounding to bfloat16 makes 0.
#pragma once
#include "elementwise.h"
#include "kernel_table.h"

namespace SHUTEYE_ISA {

template <class Part>
inline Lanes sum_of_parts(const shuteye::RankSums& sums, int64_t element, int64_t count) {
  Lanes total = load_some(static_cast<const Part*>(sums.parts[0]) + element, count);
  for (int64_t rank = 1; rank < sums.num_parts; rank++) {
    total = total + load_some(static_cast<const Part*>(sums.parts[rank]) + element, count);
  }
  return total;
}

// Elements [first, end) of [rows, width]; a row at a time, as bias and residual are by rows.
template <class T, class Part>
void sum_ranks(const shuteye::RankSums& sums, int64_t first, int64_t end) {
  const ShuteyeReduce& call = *sums.call;
  while (first < end) {
    const int64_t row = first / call.width, column = first % call.width;
    const int64_t length = smaller(call.width - column, end - first);
    const int64_t residual_row = call.residual_rows ? call.residual_rows[row] : row;
    const T* bias = call.bias ? static_cast<const T*>(call.bias) + column : nullptr;
    const T* residual =
        call.residual ? static_cast<const T*>(call.residual) + residual_row * call.width + column : nullptr;
    T* out = static_cast<T*>(call.out) + first;
    for_lanes(length, [&](int64_t index, int64_t count) {
      Lanes y = sum_of_parts<Part>(sums, first - sums.begin + index, count);
      if (bias) y = y + load_some(bias + index, count);
      if (residual) y = load_some(residual + index, count) + rounded<T>(y);
      store_some(out + index, y, count);
    });
    first += length;
  }
}

} // namespace SHUTEYE_ISA
