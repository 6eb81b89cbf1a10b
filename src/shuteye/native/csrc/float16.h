// Half precision (IEEE 754 binary16) as bits, to float and back. Knows no vectors; see bfloat16.h for the namespace.
#pragma once
#include <cstdint>
#include <cstring>

namespace SHUTEYE_ISA {

// Half the bits of a float: its exponent is moved, and infinities and NaN keep theirs.
inline float half_to_float(uint16_t half) {
  const uint32_t magnitude = (half & 0x7fffu) << 13;
  uint32_t bits = magnitude + ((127u - 15u) << 23);
  if (magnitude >= 0x7c00u << 13) bits += (127u - 15u) << 23;
  float value;
  memcpy(&value, &bits, sizeof value);
  if (magnitude < 1u << 23) value = static_cast<float>(half & 0x3ffu) * 0x1p-24f; // denormal
  return half & 0x8000u ? -value : value;
}

// To the nearest, ties to even; of what is at most 65504, or NaN.
inline uint16_t float_to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (bits < 0x38800000u) { // denormal: beside 0.5, 2^-24 is the last bit
    float shifted;
    memcpy(&shifted, &bits, sizeof shifted);
    shifted += 0.5f;
    memcpy(&bits, &shifted, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  bits += 0xfffu + (bits >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((bits >> 13) - ((127u - 15u) << 10)));
}

} // namespace SHUTEYE_ISA
