// Products of int8 tokens with quantized weights, and single rows as numbers. Knows nothing of threads.
//
// For each unit of 32 columns: whole sums, exact in 32 bits, less zero times the sum of the tokens' numbers; then, in float32
// and in the order of the columns, result += (sum * token's scale) * row's scale, and += minimum * (token's scaled sum). So a
// token's bits do not depend on how many others there are, and only where no fused multiply-add is, on the instruction set.
#pragma once
#include "quant_tokens.h"

namespace SHUTEYE_ISA {

// What the sums of a unit begin with.
template <class Unit>
inline Ints whole_start(const Unit& unit, Ints pair_of_sums, int part) {
  if constexpr (Unit::zero == 0) {
    return broadcast_int(0);
  } else if constexpr (Unit::halves == 2) {
    return multiply_pairs(unit.zero_factors(part), pair_of_sums);
  } else {
    constexpr uint32_t minus_zero = static_cast<uint32_t>(-Unit::zero) & 0xffffu;
    return multiply_pairs(broadcast_int(static_cast<int32_t>(minus_zero << 16 | minus_zero)), pair_of_sums);
  }
}

// sum + what a token's whole sum with a unit stands for.
template <class Shape, int tokens>
SHUTEYE_INLINE Lanes add_scaled(Lanes whole, Lanes scale, const Lanes (&minima)[2], TokenTile<tokens> x, int token, Lanes sum) {
  sum = fma(whole * x.floats(kScaleWord, token), scale, sum);
  if constexpr (Shape::minima == 1) sum = fma(minima[0], x.floats(kSumWord, token), sum);
  if constexpr (Shape::minima == 2) {
    sum = fma(minima[0], x.floats(kHalfSumWord, token), sum);
    sum = fma(minima[1], x.floats(kHalfSumWord + 1, token), sum);
  }
  return sum;
}

// sums[token][row] += the products of one unit.
template <int tokens, class Unit>
SHUTEYE_INLINE void multiply_unit(const Unit& unit, TokenTile<tokens> x, float* sums) {
  Ints totals[kParts][tokens];
  const auto start = [&](int part, int token) { return whole_start(unit, x.pair_of_sums(token), part); };
  add_unit_products(unit, x.words, start, totals);
  for (int part = 0; part < kParts; part++) {
    const Lanes scale = unit.scale(part);
    Lanes minima[2];
    for (int index = 0; index < Unit::minima; index++) minima[index] = unit.minimum(index, part);
    for (int token = 0; token < tokens; token++) {
      float* place = sums + token * kQuantRows + part * Lanes::width;
      store(place, add_scaled<Unit>(to_lanes(totals[part][token]), scale, minima, x, token, load(place)));
    }
  }
}

// What kinds of units have to have in common to be multiplied alike.
template <int bits_, int halves_, int zero_, int minima_>
struct Shape {
  static constexpr int bits = bits_;
  static constexpr int halves = halves_;
  static constexpr int zero = zero_;
  static constexpr int minima = minima_;
};
template <class Unit>
using ShapeOf = Shape<Unit::bits <= 4 ? 4 : Unit::bits, Unit::halves, Unit::zero, Unit::minima>;

// A unit taken apart once for many tokens.
template <class Shape>
struct OpenUnit : Shape {
  static constexpr int digits = kSplitsBytes && Shape::bits == 8 ? 2 : 1;

  // Of AMX u less zero, which it multiplies.
  alignas(64) uint8_t vectors[digits][8][kVectorBytes];
  alignas(64) float scales[kQuantRows];
  alignas(64) float minimum_of[2][kQuantRows];
  alignas(64) int32_t factors[2][kQuantRows];
  alignas(64) int32_t zeros[kQuantRows];

  template <class Unit>
  void open(const Unit& unit) {
    for (int part = 0; part < kParts; part++) {
      for_constants<8>([&](auto vector_index) SHUTEYE_INLINED {
        for_constants<digits>([&](auto digit_index) SHUTEYE_INLINED {
          constexpr int own = decltype(vector_index)::value, which = decltype(digit_index)::value;
          const Bytes bytes = unit.template digit<own, which>(part);
          if constexpr (kMatrixTokens > 0) store_bytes(vectors[which][own] + part * kPartBytes, plus(bytes, -Shape::zero));
          else store_bytes(vectors[which][own] + part * kPartBytes, bytes);
        });
      });
      const int lane = part * Lanes::width;
      store(scales + lane, unit.scale(part));
      for (int index = 0; index < Shape::minima; index++) store(minimum_of[index] + lane, unit.minimum(index, part));
      if constexpr (Shape::halves == 2) {
        for (int half = 0; half < 2; half++) store_ints(factors[half] + lane, unit.factor(half, part));
        if constexpr (Shape::zero != 0) store_ints(zeros + lane, unit.zero_factors(part));
      }
    }
  }

  template <int index, int which>
  Bytes digit(int part) const {
    const Bytes bytes = load_bytes(vectors[which][index] + part * kPartBytes);
    if constexpr (kMatrixTokens > 0) return plus(bytes, Shape::zero);
    else return bytes;
  }
  Lanes scale(int part) const { return load(scales + part * Lanes::width); }
  Lanes minimum(int index, int part) const { return load(minimum_of[index] + part * Lanes::width); }
  Ints factor(int half, int part) const { return load_ints(factors[half] + part * Lanes::width); }
  Ints zero_factors(int part) const { return load_ints(zeros + part * Lanes::width); }
};

// One unit of a block of tokens. Not to be inlined: the compiler would keep the vectors in more registers than there are.
template <class Shape>
__attribute__((noinline)) void multiply_quant_tiles(const OpenUnit<Shape>& unit, const TokenBlock& block, int64_t index, float* sums) {
  each_tile_of_tokens<kVectorTokens>(block.num_tokens, [&](auto constant, int64_t first) SHUTEYE_INLINED {
    constexpr int tokens = decltype(constant)::value;
    multiply_unit<tokens>(unit, block.tile<tokens>(index, first), sums + first * kQuantRows);
  });
}

// sums[token][row] = the products of a panel with `tokens` tokens, all there are.
template <class Unit, int tokens>
void quant_panel_once(const ShuteyeMatrix& matrix, int64_t panel, const TokenBlock& block, float* sums) {
  float own[tokens * kQuantRows] = {};
  each_unit<Unit>(matrix, panel, [&](const Unit& unit, int64_t index) {
    multiply_unit<tokens>(unit, block.tile<tokens>(index, 0), own);
  });
  memcpy(sums, own, sizeof own);
}

template <class Unit>
void quant_panel(const ShuteyeMatrix& matrix, int64_t panel, const TokenBlock& block, float* sums) {
  if constexpr (kOpensInRegisters) {
    if (block.num_tokens == 1) return quant_panel_once<Unit, 1>(matrix, panel, block, sums);
    if (block.num_tokens == 2) return quant_panel_once<Unit, 2>(matrix, panel, block, sums);
    if (block.num_tokens == 4) return quant_panel_once<Unit, 4>(matrix, panel, block, sums);
  }
  OpenUnit<ShapeOf<Unit>> open;
  memset(sums, 0, block.num_tokens * kQuantRows * sizeof(float));
  each_unit<Unit>(matrix, panel, [&](const Unit& unit, int64_t index) {
    open.open(unit);
    multiply_quant_tiles(open, block, index, sums);
  });
}

using MultiplyPanel = void (*)(const ShuteyeMatrix& matrix, int64_t panel, const TokenBlock& block, float* sums);

// How panels are multiplied: by vectors.
struct VectorProducts {
  template <class Unit>
  static constexpr MultiplyPanel multiply_panel = quant_panel<Unit>;
};

template <class Products>
MultiplyPanel multiply_of(const ShuteyeMatrix& matrix) {
  MultiplyPanel chosen = nullptr;
  with_kind(matrix, [&](auto tag) { chosen = Products::template multiply_panel<typename decltype(tag)::Unit>; });
  return chosen;
}

// Rows [first_row, end_row) of a product with tokens as quantize_tokens has prepared them; first_row begins a panel.
template <class Products>
void quant_rows(const Linear& linear, const void* prepared, void*, int64_t first_row, int64_t end_row) {
  alignas(64) float lower[kBlockTokens * kQuantRows], upper[kBlockTokens * kQuantRows];
  const bool is_paired = linear.finish == Finish::silu_mul;
  const MultiplyPanel multiply = multiply_of<Products>(linear.weight);
  const MultiplyPanel multiply_upper = is_paired ? multiply_of<Products>(linear.upper) : nullptr;
  for (int64_t first = 0; first < linear.num_tokens; first += kBlockTokens) {
    const TokenBlock block(linear, prepared, first);
    for (int64_t row = first_row; row < end_row; row += kQuantRows) {
      multiply(linear.weight, row / kQuantRows, block, lower);
      if (is_paired) multiply_upper(linear.upper, row / kQuantRows, block, upper);
      const TokenRange tokens{first, block.num_tokens};
      const int64_t num_rows = smaller(kQuantRows, end_row - row);
      const Sums sums{lower, kQuantRows}, upper_sums{upper, kQuantRows};
      if (linear.dtype == SHUTEYE_BFLOAT16) {
        finish_tile<bf16>(linear, sums, upper_sums, row, num_rows, tokens);
      } else {
        finish_tile<float>(linear, sums, upper_sums, row, num_rows, tokens);
      }
    }
  }
}

// Has the compiler round the value before it is used: dequantized numbers are those that others get from the same file.
inline float rounded_apart(float value) {
  asm("" : "+m"(value));
  return value;
}

// The 32 numbers of one row of a unit.
template <class Unit>
void dequantize_unit(const Unit& unit, int64_t lane, float* out) {
  const int part = static_cast<int>(lane / Lanes::width);
  const int64_t own = lane % Lanes::width;
  const auto of_row = [own](Lanes lanes) {
    float places[Lanes::width];
    store(places, lanes);
    return places[own];
  };
  uint8_t u[8][kPartBytes];
  for_constants<8>([&](auto index) { store_bytes(u[decltype(index)::value], unit.template whole<decltype(index)::value>(part)); });
  for (int64_t column = 0; column < kUnitColumns; column++) {
    const int half = static_cast<int>(column / 16);
    float scale = of_row(unit.scale(part));
    if constexpr (Unit::halves == 2) scale *= of_row(to_lanes(unit.whole_factor(half, part)));
    const auto number = static_cast<float>(u[column / 4][4 * own + column % 4]);
    if constexpr (Unit::has_zero_points) {
      out[column] = scale * (number - of_row(unit.zero_point(part)));
    } else {
      const float scaled = rounded_apart(scale * (number - static_cast<float>(Unit::zero)));
      out[column] = Unit::minima ? scaled + of_row(unit.minimum(Unit::minima == 2 ? half : 0, part)) : scaled;
    }
  }
}

template <class T>
void dequantize_row(const ShuteyeMatrix& matrix, int64_t row, void* out) {
  with_kind(matrix, [&](auto tag) {
    using Unit = typename decltype(tag)::Unit;
    each_unit<Unit>(matrix, row / kQuantRows, [&](const Unit& unit, int64_t index) {
      float numbers[kUnitColumns];
      dequantize_unit(unit, row % kQuantRows, numbers);
      T* target = static_cast<T*>(out) + index * kUnitColumns;
      for (int64_t column = 0; column < kUnitColumns; column++) assign(target[column], numbers[column]);
    });
  });
}

inline void fill_table(shuteye::KernelTable& table) {
  table.linear[shuteye::kQuantForm] = {prepared_tiles, quantize_tokens, quant_rows<VectorProducts>};
  table.dequantize_row[SHUTEYE_FLOAT32] = dequantize_row<float>;
  table.dequantize_row[SHUTEYE_BFLOAT16] = dequantize_row<bf16>;
}

} // namespace SHUTEYE_ISA
