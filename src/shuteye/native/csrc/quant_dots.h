// Products of a unit where four products of bytes are added up in 32 bits at once (add_dot). Knows no instruction set.
#pragma once
#include "constants.h"

namespace SHUTEYE_ISA {

constexpr bool kSplitsBytes = false;

inline Ints as_factor(Ints scale) { return scale; }

// totals[part][token] = start(part, token) + sums of products of a unit, each half's times its factor.
template <int tokens, class Unit, class Start>
SHUTEYE_INLINE void add_unit_products(const Unit& unit, const int32_t* x, const Start& start, Ints (&totals)[kParts][tokens]) {
  constexpr bool is_whole = Unit::halves == 1;
  constexpr int vectors = 8 / Unit::halves;
  for (int part = 0; part < kParts; part++)
    for (int token = 0; token < tokens; token++) totals[part][token] = start(part, token);
  for_constants<Unit::halves>([&](auto half_index) SHUTEYE_INLINED {
    constexpr int half = decltype(half_index)::value;
    Ints sums[kParts][tokens];
    for (int part = 0; part < kParts; part++)
      for (int token = 0; token < tokens; token++) sums[part][token] = is_whole ? totals[part][token] : broadcast_int(0);
    for_constants<vectors>([&](auto member) SHUTEYE_INLINED {
      constexpr int vector = half * vectors + decltype(member)::value;
      for (int part = 0; part < kParts; part++) {
        const Bytes weights = unit.template digit<vector, 0>(part);
        for (int token = 0; token < tokens; token++) {
          sums[part][token] = add_dot(sums[part][token], weights, broadcast_int(x[vector * tokens + token]));
        }
      }
    });
    for (int part = 0; part < kParts; part++) {
      for (int token = 0; token < tokens; token++) {
        if constexpr (is_whole) totals[part][token] = sums[part][token];
        else totals[part][token] = totals[part][token] + sums[part][token] * unit.factor(half, part);
      }
    }
  });
}

} // namespace SHUTEYE_ISA
