// Integer vectors of 8 rows with AVX2: bytes of weights times bytes of activations. Knows no kind of matrix.
//
// Without AVX-VNNI, products of bytes are added in 16 bits first, as many as surely fit there; of 8-bit weights, low and high
// nibbles are multiplied apart, because two products of 8 bits do not fit.
#pragma once
#include "constants.h"
#include "lanes.h"

namespace SHUTEYE_ISA {

struct Bytes { // 4 columns of each of the rows
  __m256i v;
};

struct Ints { // one for each row
  __m256i v;
};

constexpr int kParts = 2;      // vectors for the 16 rows of a panel
constexpr int kVectorTokens = 4; // that are multiplied with a vector of weights while it is in a register
constexpr bool kOpensInRegisters = true;

inline Bytes load_bytes(const uint8_t* source) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source))}; }
inline void store_bytes(uint8_t* target, Bytes bytes) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), bytes.v); }
inline Bytes operator|(Bytes left, Bytes right) { return {_mm256_or_si256(left.v, right.v)}; }

// (byte >> shift) & mask, where mask keeps no bit of a neighbour; a negative shift is one to the left.
template <int shift>
inline Bytes bits_at(Bytes bytes, int mask) {
  __m256i moved = bytes.v;
  if constexpr (shift > 0) moved = _mm256_srli_epi16(moved, shift);
  if constexpr (shift < 0) moved = _mm256_slli_epi16(moved, -shift);
  return {_mm256_and_si256(moved, _mm256_set1_epi8(static_cast<char>(mask)))};
}

// table[index], of 16 bytes.
inline Bytes look_up(const uint8_t* table, Bytes index) {
  const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return {_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), index.v)};
}

// `value` where the bit is set: bit b of the word is of byte b.
inline Bytes where_set(const uint8_t* word, int part, int value) {
  int32_t bits;
  memcpy(&bits, word + 4 * part, sizeof bits);
  const __m256i spread = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i own_bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m256i bytes = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), spread), own_bit);
  return {_mm256_and_si256(_mm256_cmpeq_epi8(bytes, own_bit), _mm256_set1_epi8(static_cast<char>(value)))};
}

inline Ints broadcast_int(int32_t value) { return {_mm256_set1_epi32(value)}; }
inline Ints load_ints(const int32_t* source) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source))}; }
inline void store_ints(int32_t* target, Ints ints) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), ints.v); }
inline Ints widen(const uint8_t* source) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source)))};
}
inline Ints widen(const int8_t* source) {
  return {_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source)))};
}
inline Ints operator+(Ints left, Ints right) { return {_mm256_add_epi32(left.v, right.v)}; }
inline Ints operator*(Ints left, Ints right) { return {_mm256_mullo_epi32(left.v, right.v)}; }
inline Ints low_nibble(Ints ints) { return {_mm256_and_si256(ints.v, _mm256_set1_epi32(15))}; }
inline Ints high_nibble(Ints ints) { return {_mm256_srli_epi32(ints.v, 4)}; }
// As two words of 16 bits, of which multiply_pairs is made.
inline Ints pair(Ints low, Ints high) { return {_mm256_blend_epi16(low.v, _mm256_slli_epi32(high.v, 16), 0xaa)}; }
// Of pairs of int16: left[0] * right[0] + left[1] * right[1].
inline Ints multiply_pairs(Ints left, Ints right) { return {_mm256_madd_epi16(left.v, right.v)}; }
inline Lanes to_lanes(Ints ints) { return {_mm256_cvtepi32_ps(ints.v)}; }

inline Lanes load_half(const uint16_t* source) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)))};
}

// Whole numbers within int8.
inline void store_whole(int8_t* target, Lanes lanes) {
  const __m256i ints = _mm256_cvtps_epi32(lanes.v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(target), _mm_packs_epi16(words, words));
}

#if defined(SHUTEYE_AVXVNNI)
// Of each row, sum + the products of its 4 columns.
inline Ints add_dot(Ints sum, Bytes weights, Ints x) { return {_mm256_dpbusd_avx_epi32(sum.v, weights.v, x.v)}; }
#else
constexpr bool kSplitsBytes = true;

// What a sum of columns that have a scale of their own is multiplied with.
inline Ints as_factor(Ints scale) { return pair(scale, scale); }

// Keeps the compiler from adding up in another order, for which it has too few registers.
inline void settle(__m256i& sum) { asm("" : "+x"(sum)); }

// sums[digit][part][token] = products of `group` vectors with tokens from `own` on, added in 16 bits.
template <int first, int group, int tokens, int own, int digits, int count, class Unit>
SHUTEYE_INLINE void add_words(const Unit& unit, const int32_t* x, __m256i (&sums)[digits][kParts][count]) {
  for_constants<group>([&](auto member) SHUTEYE_INLINED {
    constexpr int vector = first + decltype(member)::value;
    __m256i activations[count];
    for (int token = 0; token < count; token++) activations[token] = _mm256_set1_epi32(x[vector * tokens + own + token]);
    for_constants<digits>([&](auto digit_index) SHUTEYE_INLINED {
      constexpr int digit = decltype(digit_index)::value;
      for (int part = 0; part < kParts; part++) {
        const __m256i weights = unit.template digit<vector, digit>(part).v;
        for (int token = 0; token < count; token++) {
          __m256i& sum = sums[digit][part][token];
          const __m256i products = _mm256_maddubs_epi16(weights, activations[token]);
          sum = vector == first ? products : _mm256_add_epi16(sum, products);
          settle(sum);
        }
      }
    });
  });
}

// totals[part][token] = start(part, token) + sums of products of a unit, each half's times its factor.
template <int tokens, class Unit, class Start>
SHUTEYE_INLINE void add_unit_products(const Unit& unit, const int32_t* x, const Start& start, Ints (&totals)[kParts][tokens]) {
  constexpr int vectors = Unit::halves == 2 ? 4 : 8; // that have the same factor
  // 16 bits hold 2 * 127 * (2^bits - 1) so many times.
  constexpr int fitting = Unit::bits == 6 ? 2 : Unit::bits == 5 ? 4 : 8;
  constexpr int group = fitting < vectors ? fitting : vectors;
  constexpr int digits = Unit::bits == 8 ? 2 : 1;
  constexpr int count = digits == 2 && tokens > 2 ? 2 : tokens; // at a time: there are 16 registers
  for_constants<8 / group>([&](auto group_index) SHUTEYE_INLINED {
    constexpr int first = decltype(group_index)::value * group;
    for_constants<tokens / count>([&](auto turn) SHUTEYE_INLINED {
      constexpr int own = decltype(turn)::value * count;
      __m256i sums[digits][kParts][count];
      add_words<first, group, tokens, own>(unit, x, sums);
      for (int part = 0; part < kParts; part++) {
        __m256i factor = _mm256_set1_epi16(1);
        if constexpr (Unit::halves == 2) factor = unit.factor(first / 4, part).v;
        for (int token = 0; token < count; token++) {
          Ints& total = totals[part][own + token];
          if (first == 0) total = start(part, own + token);
          total.v = _mm256_add_epi32(total.v, _mm256_madd_epi16(sums[0][part][token], factor));
          if constexpr (digits == 2) {
            const __m256i high = _mm256_madd_epi16(sums[1][part][token], _mm256_set1_epi16(16));
            total.v = _mm256_add_epi32(total.v, high);
          }
        }
      }
    });
  });
}
#endif

} // namespace SHUTEYE_ISA

#if defined(SHUTEYE_AVXVNNI)
#include "quant_dots.h"
#endif
