// Eight floats at a time with AVX2 and FMA. Knows no other instruction set.
#pragma once
#include "intrinsics.h"

#include "bfloat16.h"

namespace SHUTEYE_ISA {

struct Lanes {
  static constexpr int width = 8;
  __m256 v;
};

inline Lanes broadcast(float value) { return {_mm256_set1_ps(value)}; }
inline Lanes load(const float* source) { return {_mm256_loadu_ps(source)}; }

inline Lanes load(const bf16* source) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16))};
}

// Of the pairs of bfloat16 from `pairs` on, the first ones, and the second ones.
inline Lanes load_even(const bf16* pairs) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))};
}
inline Lanes load_odd(const bf16* pairs) {
  const __m256 bits = _mm256_loadu_ps(reinterpret_cast<const float*>(pairs));
  return {_mm256_and_ps(bits, _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
}

inline void store(float* target, Lanes lanes) { _mm256_storeu_ps(target, lanes.v); }

// The bits of the nearest bfloat16 of each, followed by 16 of anything; NaN stays NaN.
inline __m256i bf16_bits(Lanes lanes) {
  const __m256i bits = _mm256_castps_si256(lanes.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i nearest = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 unordered = _mm256_cmp_ps(lanes.v, lanes.v, _CMP_UNORD_Q);
  return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(nearest), _mm256_castsi256_ps(quiet), unordered));
}

inline void store(bf16* target, Lanes lanes) {
  const __m256i high = _mm256_srli_epi32(bf16_bits(lanes), 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), packed);
}

inline Lanes round_lanes(Lanes lanes, bf16) {
  const __m256i high = _mm256_and_si256(bf16_bits(lanes), _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
  return {_mm256_castsi256_ps(high)};
}

inline Lanes operator+(Lanes left, Lanes right) { return {_mm256_add_ps(left.v, right.v)}; }
inline Lanes operator-(Lanes left, Lanes right) { return {_mm256_sub_ps(left.v, right.v)}; }
inline Lanes operator*(Lanes left, Lanes right) { return {_mm256_mul_ps(left.v, right.v)}; }
inline Lanes operator/(Lanes left, Lanes right) { return {_mm256_div_ps(left.v, right.v)}; }
inline Lanes fma(Lanes left, Lanes right, Lanes sum) { return {_mm256_fmadd_ps(left.v, right.v, sum.v)}; }
// sum = left * right + sum, into the register where sum is: GCC 12 moves sums about, and spills some of twelve.
inline void add_product(Lanes left, Lanes right, Lanes& sum) {
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum.v) : "x"(left.v), "x"(right.v));
}
inline Lanes max(Lanes left, Lanes right) { return {_mm256_max_ps(left.v, right.v)}; }
inline Lanes min(Lanes left, Lanes right) { return {_mm256_min_ps(left.v, right.v)}; }

inline float sum(Lanes lanes) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(lanes.v), _mm256_extractf128_ps(lanes.v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline float largest(Lanes lanes) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(lanes.v), _mm256_extractf128_ps(lanes.v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

inline bool any_above(Lanes lanes, float limit) {
  return _mm256_movemask_ps(_mm256_cmp_ps(lanes.v, _mm256_set1_ps(limit), _CMP_GT_OQ)) != 0;
}

inline Lanes nearest_integer(Lanes lanes) {
  return {_mm256_round_ps(lanes.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

// 2^n for whole n in [-126, 127].
inline Lanes power_of_two(Lanes n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(biased, 23))};
}

// `value` where x >= threshold, else 0.
inline Lanes zero_below(Lanes value, Lanes x, float threshold) {
  return {_mm256_and_ps(value.v, _mm256_cmp_ps(x.v, _mm256_set1_ps(threshold), _CMP_GE_OQ))};
}

} // namespace SHUTEYE_ISA
