// bfloat16 as bits, and rounding to the nearest even. Knows no vectors.
//
// Everything here and in the lanes_*.h and kernel headers lives in a namespace of its own per instruction set
// (SHUTEYE_ISA): the same header is compiled with different flags, and the linker must not mix the copies. For the same
// reason no kernel uses std:: templates, whose copies would be shared.
#pragma once
#include <cstdint>
#include <cstring>

#ifndef SHUTEYE_ISA
#error "define SHUTEYE_ISA, the namespace of this translation unit's instruction set"
#endif

namespace SHUTEYE_ISA {

struct bf16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof result);
  return result;
}

inline bf16 to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)}; // NaN stays NaN
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

inline void assign(float& place, float value) { place = value; }
inline void assign(bf16& place, float value) { place = to_bf16(value); }

// The value as type T holds it.
template <class T>
inline float rounded(float value) {
  T place;
  assign(place, value);
  return to_float(place);
}

template <class T>
inline T smaller(T left, T right) {
  return left < right ? left : right;
}

template <class T>
inline T larger(T left, T right) {
  return left > right ? left : right;
}

} // namespace SHUTEYE_ISA
