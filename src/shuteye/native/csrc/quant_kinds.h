// How each quantized kind lies in memory: panels of 16 rows, blocks of columns, units of 32. docs/matrices.md draws them.
// Knows nothing of products.
//
// w = scale * (u - zero) + minimum, where u is unsigned and of `bits` bits. A unit has one scale for each row, or, if it has
// two `halves` of 16 columns, a scale and a whole factor for each half. A kind has a `zero`, or minima, or neither.
#pragma once
#if defined(SHUTEYE_LANES_AVX512)
#include "quant_vectors_avx512.h"
#elif defined(SHUTEYE_LANES_AVX2)
#include "quant_vectors_avx2.h"
#else
#include "quant_vectors_portable.h"
#endif
#include "types.h"

namespace SHUTEYE_ISA {

constexpr int64_t kUnitColumns = 32;
constexpr int64_t kQuantRows = 16;
constexpr int kVectorBytes = 64; // 16 rows of 4 columns; a vector of the processor's has 1 / kParts of them
constexpr int kPartBytes = kVectorBytes / kParts;
constexpr int64_t kScaleBytes = 2 * kQuantRows;

// Planes: where the bits of u are. Vector j of a unit is columns [4 j, 4 j + 4) of 16 rows. get<j>(planes, part).

struct BytePlane {
  static constexpr int bits = 8;
  static constexpr int64_t nbytes = 8 * kVectorBytes;
  template <int vector>
  static Bytes get(const uint8_t* planes, int part) {
    return load_bytes(planes + vector * kVectorBytes + part * kPartBytes);
  }
  template <int vector, int digit>
  static Bytes nibble(const uint8_t* planes, int part) {
    return bits_at<4 * digit>(get<vector>(planes, part), 15);
  }
};

struct NibblePlane {
  static constexpr int bits = 4;
  static constexpr int64_t nbytes = 4 * kVectorBytes;
  template <int vector>
  static Bytes get(const uint8_t* planes, int part) {
    return bits_at<vector / 4 * 4>(load_bytes(planes + vector % 4 * kVectorBytes + part * kPartBytes), 15);
  }
};

struct PairPlane {
  static constexpr int bits = 2;
  static constexpr int64_t nbytes = 2 * kVectorBytes;
  template <int vector, int place = 0> // place: which bit of u is the lower one
  static Bytes get(const uint8_t* planes, int part) {
    const Bytes bytes = load_bytes(planes + vector / 4 * kVectorBytes + part * kPartBytes);
    return bits_at<vector % 4 * 2 - place>(bytes, 3 << place);
  }
};

// One more bit on top.
template <class Planes>
struct WithBit {
  static constexpr int bits = Planes::bits + 1;
  static constexpr int64_t nbytes = Planes::nbytes + kVectorBytes;
  template <int vector>
  static Bytes get(const uint8_t* planes, int part) {
    return Planes::template get<vector>(planes, part) |
           where_set(planes + Planes::nbytes + 8 * vector, part, 1 << Planes::bits);
  }
};

struct NibbleAndPair {
  static constexpr int bits = 6;
  static constexpr int64_t nbytes = NibblePlane::nbytes + PairPlane::nbytes;
  template <int vector>
  static Bytes get(const uint8_t* planes, int part) {
    return NibblePlane::get<vector>(planes, part) | PairPlane::get<vector, 4>(planes + NibblePlane::nbytes, part);
  }
};

// The 16 values of the IQ4 types (ggml's kvalues_iq4nl) plus 128; their low and their high nibbles.
alignas(16) constexpr uint8_t kTable[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
alignas(16) constexpr uint8_t kTableNibbles[2][16] = {
    {1, 8, 13, 15, 15, 13, 10, 6, 1, 13, 9, 6, 5, 5, 9, 1}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 13, 15}};

struct IndexPlane {
  static constexpr int bits = 8;
  static constexpr int64_t nbytes = NibblePlane::nbytes;
  template <int vector>
  static Bytes get(const uint8_t* planes, int part) {
    return look_up(kTable, NibblePlane::get<vector>(planes, part));
  }
  template <int vector, int digit>
  static Bytes nibble(const uint8_t* planes, int part) {
    return look_up(kTableNibbles[digit], NibblePlane::get<vector>(planes, part));
  }
};

inline const uint16_t* half_of(const uint8_t* halves, int part) {
  return reinterpret_cast<const uint16_t*>(halves) + part * Lanes::width;
}

inline Lanes negated(Lanes lanes) { return broadcast(-0.0f) - lanes; }

// What all kinds have: vectors of weights, as products want them.
template <class Planes>
struct UnitOf {
  static constexpr int bits = Planes::bits;
  static constexpr int halves = 1;
  static constexpr int zero = 0;
  static constexpr int minima = 0; // for each row
  static constexpr bool has_zero_points = false; // that a checkpoint chose: minima to products

  const uint8_t* planes;

  template <int vector>
  Bytes whole(int part) const {
    return Planes::template get<vector>(planes, part);
  }
  template <int vector, int which>
  Bytes digit(int part) const {
    if constexpr (kSplitsBytes && bits == 8) return Planes::template nibble<vector, which>(planes, part);
    else return whole<vector>(part);
  }
  Lanes minimum(int, int) const { return broadcast(0.0f); } // of kinds that have none
};

// Kinds of one unit for each block: scales, then minima if there are any, then planes.
template <class Planes, int zero_, bool has_minima = false>
struct PlainUnit : UnitOf<Planes> {
  static constexpr int zero = zero_;
  static constexpr int minima = has_minima;
  static constexpr int64_t scales_nbytes = (has_minima ? 2 : 1) * kScaleBytes;
  static constexpr int64_t nbytes = scales_nbytes + Planes::nbytes;
  static int64_t header_nbytes(const ShuteyeMatrix&) { return 0; }
  static int64_t block_units(const ShuteyeMatrix&) { return 1; }

  const uint8_t* scales;

  PlainUnit(const ShuteyeMatrix&, const uint8_t*, const uint8_t* unit) : UnitOf<Planes>{unit + scales_nbytes}, scales(unit) {}
  Lanes scale(int part) const { return load_half(half_of(scales, part)); }
  Lanes minimum(int, int part) const { return load_half(half_of(scales + kScaleBytes, part)); }
};

// Q4_K and Q5_K: a scale and a minimum for each unit, in 6 bits.
template <class Planes>
struct SuperUnit : UnitOf<Planes> {
  static constexpr int minima = 1;
  static constexpr int64_t sub_nbytes = 2 * kQuantRows;
  static constexpr int64_t nbytes = sub_nbytes + Planes::nbytes;
  static int64_t header_nbytes(const ShuteyeMatrix&) { return 2 * kScaleBytes; }
  static int64_t block_units(const ShuteyeMatrix&) { return 8; }

  const uint8_t* header;
  const uint8_t* subs;

  SuperUnit(const ShuteyeMatrix&, const uint8_t* header_, const uint8_t* unit)
      : UnitOf<Planes>{unit + sub_nbytes}, header(header_), subs(unit) {}
  Lanes scale(int part) const {
    return load_half(half_of(header, part)) * to_lanes(widen(subs + part * Lanes::width));
  }
  Lanes minimum(int, int part) const {
    const Lanes sub = to_lanes(widen(subs + kQuantRows + part * Lanes::width));
    return negated(load_half(half_of(header + kScaleBytes, part)) * sub);
  }
};

// Q2_K: factors and minima of 4 bits for each half.
struct TwoBitUnit : UnitOf<PairPlane> {
  static constexpr int halves = 2;
  static constexpr int minima = 2;
  static constexpr int64_t sub_nbytes = 2 * kQuantRows;
  static constexpr int64_t nbytes = sub_nbytes + PairPlane::nbytes;
  static int64_t header_nbytes(const ShuteyeMatrix&) { return 2 * kScaleBytes; }
  static int64_t block_units(const ShuteyeMatrix&) { return 8; }

  const uint8_t* header;
  const uint8_t* subs;

  TwoBitUnit(const ShuteyeMatrix&, const uint8_t* header_, const uint8_t* unit)
      : UnitOf<PairPlane>{unit + sub_nbytes}, header(header_), subs(unit) {}
  Ints sub(int half, int part) const { return widen(subs + half * kQuantRows + part * Lanes::width); }
  Lanes scale(int part) const { return load_half(half_of(header, part)); }
  Ints whole_factor(int half, int part) const { return low_nibble(sub(half, part)); }
  Ints factor(int half, int part) const { return as_factor(whole_factor(half, part)); }
  Lanes minimum(int half, int part) const {
    return negated(load_half(half_of(header + kScaleBytes, part)) * to_lanes(high_nibble(sub(half, part))));
  }
};

// Q3_K and Q6_K: signed factors for each half.
template <class Planes, int zero_>
struct SignedUnit : UnitOf<Planes> {
  static constexpr int halves = 2;
  static constexpr int zero = zero_;
  static constexpr int64_t sub_nbytes = 2 * kQuantRows;
  static constexpr int64_t nbytes = sub_nbytes + Planes::nbytes;
  static int64_t header_nbytes(const ShuteyeMatrix&) { return kScaleBytes; }
  static int64_t block_units(const ShuteyeMatrix&) { return 8; }

  const uint8_t* header;
  const uint8_t* subs;

  SignedUnit(const ShuteyeMatrix&, const uint8_t* header_, const uint8_t* unit)
      : UnitOf<Planes>{unit + sub_nbytes}, header(header_), subs(unit) {}
  Lanes scale(int part) const { return load_half(half_of(header, part)); }
  Ints whole_factor(int half, int part) const {
    return widen(reinterpret_cast<const int8_t*>(subs) + half * kQuantRows + part * Lanes::width);
  }
  Ints factor(int half, int part) const { return as_factor(whole_factor(half, part)); }
  // Minus zero times the factors of both halves, as a pair.
  Ints zero_factors(int part) const {
    return pair(whole_factor(0, part) * broadcast_int(-zero), whole_factor(1, part) * broadcast_int(-zero));
  }
};

// IQ4_XS: a signed factor for each unit.
struct IndexedUnit : UnitOf<IndexPlane> {
  static constexpr int zero = 128;
  static constexpr int64_t nbytes = kQuantRows + IndexPlane::nbytes;
  static int64_t header_nbytes(const ShuteyeMatrix&) { return kScaleBytes; }
  static int64_t block_units(const ShuteyeMatrix&) { return 8; }

  const uint8_t* header;
  const int8_t* subs;

  IndexedUnit(const ShuteyeMatrix&, const uint8_t* header_, const uint8_t* unit)
      : UnitOf<IndexPlane>{unit + kQuantRows}, header(header_), subs(reinterpret_cast<const int8_t*>(unit)) {}
  Lanes scale(int part) const {
    return load_half(half_of(header, part)) * to_lanes(widen(subs + part * Lanes::width));
  }
};

// int4 and int8: groups of units, with a scale of the checkpoint's type, and a zero point for each row if it has them.
template <class Planes, int zero_, bool has_zeros = false>
struct GroupUnit : UnitOf<Planes> {
  static constexpr int zero = zero_;
  static constexpr int minima = has_zeros;
  static constexpr bool has_zero_points = has_zeros;
  static constexpr int64_t nbytes = Planes::nbytes;
  static int64_t scales_nbytes(const ShuteyeMatrix& matrix) {
    return kQuantRows * (matrix.scale_dtype == SHUTEYE_SCALE_F32 ? 4 : 2);
  }
  static int64_t header_nbytes(const ShuteyeMatrix& matrix) {
    return scales_nbytes(matrix) + (has_zeros ? kQuantRows : 0);
  }
  static int64_t block_units(const ShuteyeMatrix& matrix) {
    return (matrix.group ? matrix.group : matrix.columns) / kUnitColumns;
  }

  const uint8_t* header;
  const uint8_t* zeros;
  int64_t scale_dtype;

  GroupUnit(const ShuteyeMatrix& matrix, const uint8_t* header_, const uint8_t* unit)
      : UnitOf<Planes>{unit}, header(header_), zeros(header_ + scales_nbytes(matrix)), scale_dtype(matrix.scale_dtype) {}
  Lanes scale(int part) const {
    if (scale_dtype == SHUTEYE_SCALE_F16) return load_half(half_of(header, part));
    if (scale_dtype == SHUTEYE_SCALE_BF16) return load(reinterpret_cast<const bf16*>(header) + part * Lanes::width);
    return load(reinterpret_cast<const float*>(header) + part * Lanes::width);
  }
  Lanes zero_point(int part) const { return to_lanes(widen(zeros + part * Lanes::width)); }
  Lanes minimum(int, int part) const { return negated(scale(part) * zero_point(part)); }
};

template <class Unit_>
struct KindTag {
  using Unit = Unit_;
};

// body(tag) with the kind's units as a type: tag.Unit.
template <class Body>
void with_kind(const ShuteyeMatrix& matrix, const Body& body) {
  switch (matrix.kind) {
    case SHUTEYE_Q8_0: return body(KindTag<PlainUnit<BytePlane, 128>>{});
    case SHUTEYE_Q4_0: return body(KindTag<PlainUnit<NibblePlane, 8>>{});
    case SHUTEYE_Q4_1: return body(KindTag<PlainUnit<NibblePlane, 0, true>>{});
    case SHUTEYE_Q5_0: return body(KindTag<PlainUnit<WithBit<NibblePlane>, 16>>{});
    case SHUTEYE_Q5_1: return body(KindTag<PlainUnit<WithBit<NibblePlane>, 0, true>>{});
    case SHUTEYE_IQ4_NL: return body(KindTag<PlainUnit<IndexPlane, 128>>{});
    case SHUTEYE_Q2_K: return body(KindTag<TwoBitUnit>{});
    case SHUTEYE_Q3_K: return body(KindTag<SignedUnit<WithBit<PairPlane>, 4>>{});
    case SHUTEYE_Q4_K: return body(KindTag<SuperUnit<NibblePlane>>{});
    case SHUTEYE_Q5_K: return body(KindTag<SuperUnit<WithBit<NibblePlane>>>{});
    case SHUTEYE_Q6_K: return body(KindTag<SignedUnit<NibbleAndPair, 32>>{});
    case SHUTEYE_IQ4_XS: return body(KindTag<IndexedUnit>{});
    case SHUTEYE_INT4:
      if (matrix.has_zeros) return body(KindTag<GroupUnit<NibblePlane, 0, true>>{});
      return body(KindTag<GroupUnit<NibblePlane, 8>>{});
    case SHUTEYE_INT8: return body(KindTag<GroupUnit<BytePlane, 128>>{});
  }
}

// body(unit, index) for each unit of a panel, in the order of the columns.
template <class Unit, class Body>
inline void each_unit(const ShuteyeMatrix& matrix, int64_t panel, const Body& body) {
  const int64_t header_nbytes = Unit::header_nbytes(matrix), block_units = Unit::block_units(matrix);
  const int64_t num_blocks = matrix.columns / (block_units * kUnitColumns);
  const auto* at = static_cast<const uint8_t*>(matrix.data) + panel * num_blocks * (header_nbytes + block_units * Unit::nbytes);
  int64_t index = 0;
  for (int64_t block = 0; block < num_blocks; block++) {
    const uint8_t* header = at;
    at += header_nbytes;
    for (int64_t own = 0; own < block_units; own++, at += Unit::nbytes) body(Unit(matrix, header, at), index++);
  }
}

} // namespace SHUTEYE_ISA
