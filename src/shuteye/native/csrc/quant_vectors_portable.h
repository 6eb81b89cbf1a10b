// Integer vectors of 4 rows with the compiler's own: bytes of weights times bytes of activations. Knows no kind of matrix.
#pragma once
#include "constants.h"
#include "float16.h"
#include "lanes.h"

namespace SHUTEYE_ISA {

typedef uint8_t Uint8s __attribute__((vector_size(16)));
typedef uint16_t Uint16s __attribute__((vector_size(16)));
typedef int16_t Int16s __attribute__((vector_size(16)));
typedef uint32_t UnsignedInts __attribute__((vector_size(16)));

struct Bytes { // 4 columns of each of the rows
  Uint8s v;
};

struct Ints { // one for each row
  Lanes::Ints v;
};

constexpr int kParts = 4;
constexpr int kVectorTokens = 1;
constexpr bool kOpensInRegisters = false;

inline Bytes load_bytes(const uint8_t* source) {
  Bytes result;
  memcpy(&result.v, source, sizeof result.v);
  return result;
}
inline void store_bytes(uint8_t* target, Bytes bytes) { memcpy(target, &bytes.v, sizeof bytes.v); }
inline Bytes operator|(Bytes left, Bytes right) { return {left.v | right.v}; }

template <int shift>
inline Bytes bits_at(Bytes bytes, int mask) {
  const auto kept = static_cast<uint8_t>(mask);
  if constexpr (shift >= 0) return {(bytes.v >> shift) & kept};
  return {(bytes.v << -shift) & kept};
}

__attribute__((noinline)) inline Bytes look_up(const uint8_t* table, Bytes index) {
  Bytes result;
  for (int byte = 0; byte < 16; byte++) result.v[byte] = table[index.v[byte]];
  return result;
}

__attribute__((noinline)) inline Bytes where_set(const uint8_t* word, int part, int value) {
  Bytes result;
  for (int byte = 0; byte < 16; byte++) {
    result.v[byte] = static_cast<uint8_t>(word[2 * part + byte / 8] >> (byte % 8) & 1 ? value : 0);
  }
  return result;
}

inline Ints broadcast_int(int32_t value) { return {Lanes::Ints{value, value, value, value}}; }
inline Ints load_ints(const int32_t* source) {
  Ints result;
  memcpy(&result.v, source, sizeof result.v);
  return result;
}
inline void store_ints(int32_t* target, Ints ints) { memcpy(target, &ints.v, sizeof ints.v); }
inline Ints widen(const uint8_t* source) { return {Lanes::Ints{source[0], source[1], source[2], source[3]}}; }
inline Ints widen(const int8_t* source) { return {Lanes::Ints{source[0], source[1], source[2], source[3]}}; }
inline Ints operator+(Ints left, Ints right) { return {left.v + right.v}; }
inline Ints operator*(Ints left, Ints right) { return {left.v * right.v}; }
inline Ints low_nibble(Ints ints) { return {ints.v & 15}; }
inline Ints high_nibble(Ints ints) { return {ints.v >> 4}; } // of no negative number
inline Ints low_words(Ints pairs) { // sign extended
  return {reinterpret_cast<Lanes::Ints>(reinterpret_cast<UnsignedInts>(pairs.v) << 16) >> 16};
}
inline Ints pair(Ints low, Ints high) {
  return {reinterpret_cast<Lanes::Ints>((reinterpret_cast<UnsignedInts>(high.v) << 16) |
                                        (reinterpret_cast<UnsignedInts>(low.v) & 0xffffu))};
}
inline Ints multiply_pairs(Ints left, Ints right) {
  return {low_words(left).v * low_words(right).v + (left.v >> 16) * (right.v >> 16)};
}
inline Lanes to_lanes(Ints ints) { return {__builtin_convertvector(ints.v, Lanes::Floats)}; }

inline Lanes load_half(const uint16_t* source) {
  uint16_t halves[4];
  memcpy(halves, source, sizeof halves);
  return {Lanes::Floats{half_to_float(halves[0]), half_to_float(halves[1]), half_to_float(halves[2]),
                        half_to_float(halves[3])}};
}

inline void store_whole(int8_t* target, Lanes lanes) {
  for (int lane = 0; lane < 4; lane++) target[lane] = static_cast<int8_t>(lanes.v[lane]);
}

// Of each row, sum + the products of its 4 columns. A product fits in 16 bits, two do not.
inline Ints add_dot(Ints sum, Bytes weights, Ints x) {
  const auto words = reinterpret_cast<Uint16s>(weights.v);
  const auto columns = reinterpret_cast<Int16s>(x.v); // two bytes each
  const Int16s even_columns = reinterpret_cast<Int16s>(reinterpret_cast<Uint16s>(columns) << 8) >> 8;
  const Int16s even = reinterpret_cast<Int16s>(words & uint16_t{0xff}) * even_columns;
  const Int16s odd = reinterpret_cast<Int16s>(words >> 8) * (columns >> 8);
  const Ints evens{reinterpret_cast<Lanes::Ints>(even)}, odds{reinterpret_cast<Lanes::Ints>(odd)};
  return {sum.v + low_words(evens).v + (evens.v >> 16) + low_words(odds).v + (odds.v >> 16)};
}

} // namespace SHUTEYE_ISA

#include "quant_dots.h"
