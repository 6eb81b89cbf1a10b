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

#if !defined(SHUTEYE_LANES_AVX512)
inline Lanes round_lanes(Lanes lanes, bf16) {
  bf16 places[Lanes::width];
  store(places, lanes);
  return load(places);
}
#endif

// left / right, as exact as T can hold it.
inline Lanes quotient(Lanes left, Lanes right, float) { return left / right; }
#if !defined(SHUTEYE_LANES_AVX512)
inline Lanes quotient(Lanes left, Lanes right, bf16) { return left / right; }
#endif

template <class T>
inline Lanes rounded(Lanes lanes) {
  return round_lanes(lanes, T{});
}

// exp with a relative error below 2e-7; 0 below -87.3, and no infinity: arguments are capped at 88.
// Range reduction to [-ln2/2, ln2/2] and polynomial as in Cephes' expf.
inline Lanes exp(Lanes x) {
  const Lanes capped = max(min(x, broadcast(88.0f)), broadcast(-87.3f));
  const Lanes n = nearest_integer(capped * broadcast(1.44269504088896341f));
  Lanes r = fma(n, broadcast(-0.693359375f), capped);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Lanes p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  const Lanes value = fma(p * r, r, r + broadcast(1.0f)) * power_of_two(n);
  return zero_below(value, x, -87.3f);
}

} // namespace SHUTEYE_ISA
