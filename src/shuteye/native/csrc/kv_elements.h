// What a KV cache may hold besides the model's own numbers: half precision, and int8 with one scale for each token and KV
// head. Knows nothing of where they lie (kv_cache.h).
#pragma once
#include "float16.h"
#include "lanes.h"

namespace SHUTEYE_ISA {

struct f16 {
  uint16_t bits;
};

struct i8 { // a struct, so that templates find what is declared here
  int8_t value;
};

template <class C>
constexpr bool kHasScales = false;
template <>
constexpr bool kHasScales<i8> = true;

constexpr float kLargestHalf = 65504.0f;

#if defined(SHUTEYE_LANES_AVX512)
inline Lanes load(const f16* source) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)))};
}
inline void store_halves(f16* target, Lanes lanes) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_cvtps_ph(lanes.v, _MM_FROUND_TO_NEAREST_INT));
}
inline Lanes load(const i8* source) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))))};
}
inline void store(i8* target, Lanes lanes) { // numbers within int8, rounded to the nearest, ties to even
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(lanes.v)));
}
#elif defined(SHUTEYE_LANES_AVX2)
inline Lanes load(const f16* source) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)))};
}
inline void store_halves(f16* target, Lanes lanes) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_cvtps_ph(lanes.v, _MM_FROUND_TO_NEAREST_INT));
}
inline Lanes load(const i8* source) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source))))};
}
inline void store(i8* target, Lanes lanes) { // numbers within int8, rounded to the nearest, ties to even
  const __m256i ints = _mm256_cvtps_epi32(lanes.v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(target), _mm_packs_epi16(words, words));
}
#else
inline Lanes load(const f16* source) {
  return {Lanes::Floats{half_to_float(source[0].bits), half_to_float(source[1].bits), half_to_float(source[2].bits),
                        half_to_float(source[3].bits)}};
}
inline void store_halves(f16* target, Lanes lanes) {
  for (int lane = 0; lane < 4; lane++) target[lane] = {float_to_half(lanes.v[lane])};
}
inline Lanes load(const i8* source) {
  return {Lanes::Floats{static_cast<float>(source[0].value), static_cast<float>(source[1].value),
                        static_cast<float>(source[2].value), static_cast<float>(source[3].value)}};
}
inline void store(i8* target, Lanes lanes) { // numbers within int8, rounded to the nearest, ties to even
  const Lanes whole = nearest_integer(lanes);
  for (int lane = 0; lane < 4; lane++) target[lane] = {static_cast<int8_t>(whole.v[lane])};
}
#endif

// What is too large becomes the largest: an infinity would make every sum that meets it one, or NaN. NaN stays NaN.
inline void store(f16* target, Lanes lanes) {
  store_halves(target, max(broadcast(-kLargestHalf), min(broadcast(kLargestHalf), lanes)));
}

} // namespace SHUTEYE_ISA
