// What every kernel builds on: Lanes for this translation unit, partial loads and stores, exp. Knows no kernel.
#pragma once

#if defined(SHUTEYE_LANES_AVX512)
#include "lanes_avx512.h"
#elif defined(SHUTEYE_LANES_AVX2)
#include "lanes_avx2.h"
#else
#include "lanes_portable.h"
#endif

namespace SHUTEYE_ISA {

// The first `count` < width lanes; the others are 0. Reads nothing beyond them.
template <class T>
inline Lanes load_partial(const T* source, int64_t count) {
  T padded[Lanes::width] = {};
  memcpy(padded, source, count * sizeof(T));
  return load(padded);
}

template <class T>
inline void store_partial(T* target, Lanes lanes, int64_t count) {
  T padded[Lanes::width];
  store(padded, lanes);
  memcpy(target, padded, count * sizeof(T));
}

// Calls body(load, store, index) over [0, count): full vectors, then one partial one.
template <class Body>
inline void for_lanes(int64_t count, const Body& body) {
  int64_t index = 0;
  for (; index + Lanes::width <= count; index += Lanes::width) body(index, int64_t{Lanes::width});
  if (index < count) body(index, count - index);
}

template <class T>
inline Lanes load_some(const T* source, int64_t count) {
  return count == Lanes::width ? load(source) : load_partial(source, count);
}

template <class T>
inline void store_some(T* target, Lanes lanes, int64_t count) {
  if (count == Lanes::width) return store(target, lanes);
  store_partial(target, lanes, count);
}

// The values as type T holds them.
inline Lanes round_lanes(Lanes lanes, float) { return lanes; }

// left / right, as exact as T can hold it.
inline Lanes quotient(Lanes left, Lanes right, float) { return left / right; }
#if !defined(SHUTEYE_LANES_AVX512)
inline Lanes quotient(Lanes left, Lanes right, bf16) { return left / right; }
#endif

template <class T>
inline Lanes rounded(Lanes lanes) {
  return round_lanes(lanes, T{});
}

// exp of arguments in [-87.3, 88], with a relative error below 2e-7. Range reduction to [-ln2/2, ln2/2] and polynomial as in
// Cephes' expf, in pairs of terms: many vectors wait for few results.
inline Lanes exp_within(Lanes x) {
  const Lanes n = nearest_integer(x * broadcast(1.44269504088896341f));
  Lanes r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  const Lanes square = r * r;
  const Lanes high = fma(broadcast(1.9875691500e-4f), r, broadcast(1.3981999507e-3f));
  const Lanes middle = fma(broadcast(8.3334519073e-3f), r, broadcast(4.1665795894e-2f));
  const Lanes low = fma(broadcast(1.6666665459e-1f), r, broadcast(5.0000001201e-1f));
  const Lanes p = fma(fma(high, square, middle), square, low);
  return fma(p, square, r + broadcast(1.0f)) * power_of_two(n);
}

// 0 below -87.3, and no infinity: arguments are capped at 88.
inline Lanes exp(Lanes x) {
  return zero_below(exp_within(max(min(x, broadcast(88.0f)), broadcast(-87.3f))), x, -87.3f);
}

} // namespace SHUTEYE_ISA
