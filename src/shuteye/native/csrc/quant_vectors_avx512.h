// Integer vectors of 16 rows with AVX-512 VNNI: bytes of weights times bytes of activations. Knows no kind of matrix.
#pragma once
#include "constants.h"
#include "lanes.h"

namespace SHUTEYE_ISA {

struct Bytes { // 4 columns of each of the rows
  __m512i v;
};

struct Ints { // one for each row
  __m512i v;
};

constexpr int kParts = 1;
constexpr int kVectorTokens = 8;
constexpr bool kOpensInRegisters = true;

inline Bytes load_bytes(const uint8_t* source) { return {_mm512_loadu_si512(source)}; }
inline void store_bytes(uint8_t* target, Bytes bytes) { _mm512_storeu_si512(target, bytes.v); }
inline Bytes operator|(Bytes left, Bytes right) { return {_mm512_or_si512(left.v, right.v)}; }
inline Bytes plus(Bytes bytes, int value) { return {_mm512_add_epi8(bytes.v, _mm512_set1_epi8(static_cast<char>(value)))}; }

template <int shift>
inline Bytes bits_at(Bytes bytes, int mask) {
  __m512i moved = bytes.v;
  if constexpr (shift > 0) moved = _mm512_srli_epi16(moved, shift);
  if constexpr (shift < 0) moved = _mm512_slli_epi16(moved, -shift);
  return {_mm512_and_si512(moved, _mm512_set1_epi8(static_cast<char>(mask)))};
}

inline Bytes look_up(const uint8_t* table, Bytes index) {
  const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), index.v)};
}

inline Bytes where_set(const uint8_t* word, int, int value) {
  uint64_t bits;
  memcpy(&bits, word, sizeof bits);
  return {_mm512_maskz_set1_epi8(bits, static_cast<char>(value))};
}

inline Ints broadcast_int(int32_t value) { return {_mm512_set1_epi32(value)}; }
inline Ints load_ints(const int32_t* source) { return {_mm512_loadu_si512(source)}; }
inline void store_ints(int32_t* target, Ints ints) { _mm512_storeu_si512(target, ints.v); }
inline Ints widen(const uint8_t* source) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)))};
}
inline Ints widen(const int8_t* source) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)))};
}
inline Ints operator+(Ints left, Ints right) { return {_mm512_add_epi32(left.v, right.v)}; }
inline Ints operator*(Ints left, Ints right) { return {_mm512_mullo_epi32(left.v, right.v)}; }
inline Ints low_nibble(Ints ints) { return {_mm512_and_si512(ints.v, _mm512_set1_epi32(15))}; }
inline Ints high_nibble(Ints ints) { return {_mm512_srli_epi32(ints.v, 4)}; }
inline Ints pair(Ints low, Ints high) {
  return {_mm512_mask_blend_epi16(0xaaaaaaaau, low.v, _mm512_slli_epi32(high.v, 16))};
}
inline Ints multiply_pairs(Ints left, Ints right) { return {_mm512_madd_epi16(left.v, right.v)}; }
inline Lanes to_lanes(Ints ints) { return {_mm512_cvtepi32_ps(ints.v)}; }

inline Lanes load_half(const uint16_t* source) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)))};
}

inline void store_whole(int8_t* target, Lanes lanes) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(lanes.v)));
}

// Of each row, sum + the products of its 4 columns.
inline Ints add_dot(Ints sum, Bytes weights, Ints x) { return {_mm512_dpbusd_epi32(sum.v, weights.v, x.v)}; }

} // namespace SHUTEYE_ISA

#include "quant_dots.h"
