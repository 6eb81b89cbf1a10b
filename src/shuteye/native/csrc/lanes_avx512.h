// Sixteen floats at a time with AVX-512 (F, BW, DQ, VL, BF16). Knows no other instruction set.
#pragma once
#include "intrinsics.h"

#include "bfloat16.h"

namespace SHUTEYE_ISA {

struct Lanes {
  static constexpr int width = 16;
  __m512 v;
};

inline Lanes broadcast(float value) { return {_mm512_set1_ps(value)}; }
inline Lanes load(const float* source) { return {_mm512_loadu_ps(source)}; }

inline Lanes load(const bf16* source) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
}

// Of the pairs of bfloat16 from `pairs` on, the first ones, and the second ones.
inline Lanes load_even(const bf16* pairs) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(pairs), 16))};
}
inline Lanes load_odd(const bf16* pairs) {
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(pairs), mask))};
}

inline void store(float* target, Lanes lanes) { _mm512_storeu_ps(target, lanes.v); }

inline void store(bf16* target, Lanes lanes) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), (__m256i)_mm512_cvtneps_pbh(lanes.v));
}

inline Lanes round_lanes(Lanes lanes, bf16) {
  const auto halves = (__m256i)_mm512_cvtneps_pbh(lanes.v);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
}

// One step of Newton's after an estimate of 14 bits; `right` is finite and not denormal.
inline Lanes quotient(Lanes left, Lanes right, bf16) {
  const __m512 estimate = _mm512_rcp14_ps(right.v);
  const __m512 inverse = _mm512_mul_ps(estimate, _mm512_fnmadd_ps(right.v, estimate, _mm512_set1_ps(2.0f)));
  return {_mm512_mul_ps(left.v, inverse)};
}

inline Lanes operator+(Lanes left, Lanes right) { return {_mm512_add_ps(left.v, right.v)}; }
inline Lanes operator-(Lanes left, Lanes right) { return {_mm512_sub_ps(left.v, right.v)}; }
inline Lanes operator*(Lanes left, Lanes right) { return {_mm512_mul_ps(left.v, right.v)}; }
inline Lanes operator/(Lanes left, Lanes right) { return {_mm512_div_ps(left.v, right.v)}; }
inline Lanes fma(Lanes left, Lanes right, Lanes sum) { return {_mm512_fmadd_ps(left.v, right.v, sum.v)}; }
inline void add_product(Lanes left, Lanes right, Lanes& sum) { sum = fma(left, right, sum); }
inline Lanes max(Lanes left, Lanes right) { return {_mm512_max_ps(left.v, right.v)}; }
inline Lanes min(Lanes left, Lanes right) { return {_mm512_min_ps(left.v, right.v)}; }
inline float sum(Lanes lanes) { return _mm512_reduce_add_ps(lanes.v); }
inline float largest(Lanes lanes) { return _mm512_reduce_max_ps(lanes.v); }

inline bool any_above(Lanes lanes, float limit) {
  return _mm512_cmp_ps_mask(lanes.v, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
}

inline Lanes nearest_integer(Lanes lanes) {
  return {_mm512_roundscale_ps(lanes.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

// 2^n for whole n in [-126, 127].
inline Lanes power_of_two(Lanes n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}

// `value` where x >= threshold, else 0.
inline Lanes zero_below(Lanes value, Lanes x, float threshold) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(threshold), _CMP_GE_OQ), value.v)};
}

} // namespace SHUTEYE_ISA
