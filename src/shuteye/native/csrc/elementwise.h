// Norm, rotary positions, SiLU, per row. Knows nothing of threads or of caches.
//
// Rounding follows torch: results are rounded to the model's type wherever an operation of models/fused.py ends.
#pragma once
#include "lanes.h"

namespace SHUTEYE_ISA {

template <class T>
inline float inverse_rms(const T* x, int64_t width, float eps) {
  Lanes squares = broadcast(0.0f);
  for_lanes(width, [&](int64_t index, int64_t count) {
    const Lanes lanes = load_some(x + index, count);
    squares = fma(lanes, lanes, squares);
  });
  return 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(width) + eps);
}

// out may be x. `Out` may be wider than T: the values are as T holds them.
template <class T, class Out>
inline void norm_row(const T* x, const T* weight, float eps, Out* out, int64_t width) {
  const Lanes scale = broadcast(inverse_rms(x, width, eps));
  for_lanes(width, [&](int64_t index, int64_t count) {
    const Lanes scaled = load_some(x + index, count) * scale * load_some(weight + index, count);
    store_some(out + index, rounded<T>(scaled), count);
  });
}

template <class T>
void norm_rows(const void* x, const void* weight, float eps, void* out, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; row++) {
    const int64_t offset = row * width;
    norm_row(static_cast<const T*>(x) + offset, static_cast<const T*>(weight), eps, static_cast<T*>(out) + offset,
             width);
  }
}

// Halves are real and imaginary parts: out = round(x * cos) + rotate_half(x) * sin. out may be x. head_dim is even.
template <class T>
inline void rotate_head(const T* x, const T* cos, const T* sin, T* out, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  for_lanes(half, [&](int64_t index, int64_t count) {
    const Lanes low = load_some(x + index, count), high = load_some(x + half + index, count);
    const Lanes low_kept = rounded<T>(low * load_some(cos + index, count));
    const Lanes high_kept = rounded<T>(high * load_some(cos + half + index, count));
    store_some(out + index, low_kept - high * load_some(sin + index, count), count);
    store_some(out + half + index, fma(low, load_some(sin + half + index, count), high_kept), count);
  });
}

template <class T>
inline Lanes silu_mul(Lanes gate, Lanes up) {
  const Lanes weight = exp_within(max(min(broadcast(0.0f) - gate, broadcast(88.0f)), broadcast(-87.3f)));
  const Lanes activated = rounded<T>(quotient(gate, broadcast(1.0f) + weight, T{}));
  return activated * up;
}

template <class T>
void silu_mul_rows(const void* gate_up, void* out, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; row++) {
    const T* gate = static_cast<const T*>(gate_up) + row * 2 * width;
    T* target = static_cast<T*>(out) + row * width;
    for_lanes(width, [&](int64_t index, int64_t count) {
      const Lanes result = silu_mul<T>(load_some(gate + index, count), load_some(gate + width + index, count));
      store_some(target + index, result, count);
    });
  }
}

} // namespace SHUTEYE_ISA
