// Four floats at a time with the compiler's own vectors: any CPU. Knows no instruction set.
#pragma once
#include "bfloat16.h"

namespace SHUTEYE_ISA {

struct Lanes {
  static constexpr int width = 4;
  typedef float Floats __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  Floats v;
};

inline Lanes broadcast(float value) { return {Lanes::Floats{value, value, value, value}}; }

inline Lanes load(const float* source) {
  Lanes result;
  memcpy(&result.v, source, sizeof result.v);
  return result;
}

inline Lanes load(const bf16* source) {
  uint16_t halves[4];
  memcpy(halves, source, sizeof halves);
  const Lanes::Ints bits{static_cast<int32_t>(static_cast<uint32_t>(halves[0]) << 16),
                         static_cast<int32_t>(static_cast<uint32_t>(halves[1]) << 16),
                         static_cast<int32_t>(static_cast<uint32_t>(halves[2]) << 16),
                         static_cast<int32_t>(static_cast<uint32_t>(halves[3]) << 16)};
  return {reinterpret_cast<Lanes::Floats>(bits)};
}

// Of the pairs of bfloat16 from `pairs` on, the first ones, and the second ones.
inline Lanes load_even(const bf16* pairs) {
  Lanes::Ints bits;
  memcpy(&bits, pairs, sizeof bits);
  return {reinterpret_cast<Lanes::Floats>(bits << 16)};
}
inline Lanes load_odd(const bf16* pairs) {
  Lanes::Ints bits;
  memcpy(&bits, pairs, sizeof bits);
  return {reinterpret_cast<Lanes::Floats>(bits & static_cast<int32_t>(0xffff0000u))};
}

inline void store(float* target, Lanes lanes) { memcpy(target, &lanes.v, sizeof lanes.v); }

inline void store(bf16* target, Lanes lanes) {
  for (int lane = 0; lane < 4; lane++) target[lane] = to_bf16(lanes.v[lane]);
}

inline Lanes round_lanes(Lanes lanes, bf16) {
  bf16 places[4];
  store(places, lanes);
  return load(places);
}

inline Lanes operator+(Lanes left, Lanes right) { return {left.v + right.v}; }
inline Lanes operator-(Lanes left, Lanes right) { return {left.v - right.v}; }
inline Lanes operator*(Lanes left, Lanes right) { return {left.v * right.v}; }
inline Lanes operator/(Lanes left, Lanes right) { return {left.v / right.v}; }
inline Lanes fma(Lanes left, Lanes right, Lanes sum) { return {left.v * right.v + sum.v}; }
inline void add_product(Lanes left, Lanes right, Lanes& sum) { sum = fma(left, right, sum); }
inline Lanes max(Lanes left, Lanes right) { return {left.v > right.v ? left.v : right.v}; }
inline Lanes min(Lanes left, Lanes right) { return {left.v < right.v ? left.v : right.v}; }
inline float sum(Lanes lanes) { return (lanes.v[0] + lanes.v[2]) + (lanes.v[1] + lanes.v[3]); }

inline float largest(Lanes lanes) {
  return larger(larger(lanes.v[0], lanes.v[1]), larger(lanes.v[2], lanes.v[3]));
}

inline bool any_above(Lanes lanes, float limit) {
  return lanes.v[0] > limit || lanes.v[1] > limit || lanes.v[2] > limit || lanes.v[3] > limit;
}

inline Lanes nearest_integer(Lanes lanes) { // |x| < 2^22
  const Lanes magic = broadcast(12582912.0f);
  return (lanes + magic) - magic;
}

// 2^n for whole n in [-126, 127].
inline Lanes power_of_two(Lanes n) {
  return {reinterpret_cast<Lanes::Floats>((__builtin_convertvector(n.v, Lanes::Ints) + 127) << 23)};
}

// `value` where x >= threshold, else 0.
inline Lanes zero_below(Lanes value, Lanes x, float threshold) {
  return {x.v >= broadcast(threshold).v ? value.v : Lanes::Floats{}};
}

} // namespace SHUTEYE_ISA
