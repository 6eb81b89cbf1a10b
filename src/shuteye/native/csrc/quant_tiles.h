// Products of int8 tokens with quantized weights by AMX: sums[16 tokens, 16 rows] = x[16 tokens, 32] u[16 rows, 32]^T, for each
// unit of 32 columns. Knows nothing of threads.
//
// A unit's vectors, [8][16 rows][4 columns], are a tile as they are. Sums are of one unit (of a half, where halves have factors
// of their own), as each has its scales: so tiles are filled by half or by a quarter, and what takes the time is not their 16
// cycles but to scale their sums, three instructions or more for each 16. Sums and the order in which they are added up are
// those of vectors (quant.h), so that a token's bits do not depend on whether its tile is full. Never run on hardware; ADR 25.
#pragma once
#include "quant.h"
#include "tiles.h"

namespace SHUTEYE_ISA {

constexpr int64_t kRunUnits = 8; // that all tokens of a block meet, one after the other

// Tiles 0 to 3 are sums, 4 and 5 tokens and weights of a unit, 6 and 7 those of half a unit.
inline void configure_quant_tiles() {
  constexpr uint16_t row_bytes[8] = {64, 64, 64, 64, 32, 64, 16, 64};
  constexpr uint8_t rows[8] = {16, 16, 16, 16, 16, 8, 16, 4};
  TileConfig config{};
  config.palette = 1;
  for (int tile = 0; tile < 8; tile++) {
    config.row_bytes[tile] = row_bytes[tile];
    config.rows[tile] = rows[tile];
  }
  load_config(config);
}

// target[16 tokens][16 rows] = x times weights, all of them tiles; instructions have literal numbers of tiles.
#define SHUTEYE_STORE_PRODUCT(sums, x, weights, target) \
  do {                                                  \
    _tile_zero(sums);                                   \
    _tile_dpbssd(sums, x, weights);                     \
    _tile_stored(sums, target, 64);                     \
  } while (false)

// 16 tokens on their way through a run of units.
template <class Shape>
class TileRun {
 public:
  static constexpr int halves = Shape::halves;
  static_assert(Shape::zero > 0 || Shape::bits < 8, "less zero, weights are int8");

  TileRun(const OpenUnit<Shape>* units, const TokenBlock& block, int64_t first_unit, int64_t first_token)
      : units_(units), block_(block), first_unit_(first_unit), first_token_(first_token) {}

  // sums[token][row] += the products of units [0, count). Two units are under way: the products of one are scaled while the
  // other's are made.
  SHUTEYE_INLINE void run(int64_t count, float* sums) const {
    Products even, odd;
    Totals totals;
    for (int token = 0; token < kMatrixTokens; token++) totals[token] = load(sums + token * kQuantRows);
    multiply<0>(0, even);
    for (int64_t unit = 0; unit < count; unit += 2) {
      if (unit + 1 < count) multiply<1>(unit + 1, odd);
      scale(unit, even, totals);
      if (unit + 1 == count) break;
      if (unit + 2 < count) multiply<0>(unit + 2, even);
      scale(unit + 1, odd, totals);
    }
    for (int token = 0; token < kMatrixTokens; token++) store(sums + token * kQuantRows, totals[token]);
  }

 private:
  using Totals = Lanes[kMatrixTokens]; // in registers
  struct Products { // whole sums of one unit
    alignas(64) int32_t of[halves][kMatrixTokens][kQuantRows];
  };

  TokenTile<kMatrixTokens> tokens_of(int64_t unit) const {
    return block_.tile<kMatrixTokens>(first_unit_ + unit, first_token_);
  }

  template <int turn>
  SHUTEYE_INLINE void multiply(int64_t unit, Products& products) const {
    const int32_t* x = tokens_of(unit).words;
    const uint8_t* weights = units_[unit].vectors[0][0];
    constexpr int64_t x_stride = kNumberWords * sizeof(int32_t);
    finish_stores(weights);
    if constexpr (halves == 1) {
      _tile_loadd(4, x, x_stride);
      _tile_loadd(5, weights, kVectorBytes);
      if constexpr (turn == 0) SHUTEYE_STORE_PRODUCT(0, 4, 5, products.of[0]);
      else SHUTEYE_STORE_PRODUCT(2, 4, 5, products.of[0]);
    } else {
      _tile_loadd(6, x, x_stride);
      _tile_loadd(7, weights, kVectorBytes);
      if constexpr (turn == 0) SHUTEYE_STORE_PRODUCT(0, 6, 7, products.of[0]);
      else SHUTEYE_STORE_PRODUCT(2, 6, 7, products.of[0]);
      _tile_loadd(6, x + kNumberWords / 2, x_stride);
      _tile_loadd(7, weights + 4 * kVectorBytes, kVectorBytes);
      if constexpr (turn == 0) SHUTEYE_STORE_PRODUCT(1, 6, 7, products.of[1]);
      else SHUTEYE_STORE_PRODUCT(3, 6, 7, products.of[1]);
    }
    finish_stores(&products);
  }

  // The whole sum of a token's products, as float: exact.
  SHUTEYE_INLINE Lanes whole(const Products& products, const Lanes* factors, int token) const {
    const auto half = [&](int index) SHUTEYE_INLINED { return to_lanes(load_ints(products.of[index][token])); };
    if constexpr (halves == 1) {
      return half(0);
    } else {
      constexpr int most = Shape::zero > 0 ? Shape::zero : (1 << Shape::bits) - 1;
      static_assert(2 * 16 * 127 * most * 128 < 1 << 24, "float holds factors times sums, and their sum");
      return fma(half(1), factors[1], half(0) * factors[0]);
    }
  }

  SHUTEYE_INLINE void scale(int64_t index, const Products& products, Totals& totals) const {
    const OpenUnit<Shape>& unit = units_[index];
    const TokenTile<kMatrixTokens> x = tokens_of(index);
    Lanes factors[halves], minima[2];
    if constexpr (halves == 2) {
      for (int half = 0; half < 2; half++) factors[half] = to_lanes(unit.factor(half, 0));
    }
    for (int each = 0; each < Shape::minima; each++) minima[each] = unit.minimum(each, 0);
    const Lanes scale = unit.scale(0);
    for (int token = 0; token < kMatrixTokens; token++) {
      totals[token] = add_scaled<Shape>(whole(products, factors, token), scale, minima, x, token, totals[token]);
    }
  }

  const OpenUnit<Shape>* const units_;
  const TokenBlock& block_;
  const int64_t first_unit_;
  const int64_t first_token_;
};

// sums[token][row] += units [0, count) of a panel, which are the block's from `first_unit` on.
template <class Shape>
__attribute__((noinline)) void multiply_run(const OpenUnit<Shape>* units, int64_t count, const TokenBlock& block, int64_t first_unit,
                                            float* sums) {
  each_tile_of_tokens(block.num_tokens, [&](auto constant, int64_t first) SHUTEYE_INLINED {
    constexpr int tokens = decltype(constant)::value;
    float* own = sums + first * kQuantRows;
    if constexpr (tokens == kMatrixTokens) {
      TileRun<Shape>(units, block, first_unit, first).run(count, own);
    } else {
      for (int64_t unit = 0; unit < count; unit++) multiply_unit<tokens>(units[unit], block.tile<tokens>(first_unit + unit, first), own);
    }
  });
}

template <class Unit>
void quant_tile_panel(const ShuteyeMatrix& matrix, int64_t panel, const TokenBlock& block, float* sums) {
  if (block.num_tokens < kMatrixTokens) return quant_panel<Unit>(matrix, panel, block, sums);
  OpenUnit<ShapeOf<Unit>> run[kRunUnits];
  int64_t count = 0;
  memset(sums, 0, block.num_tokens * kQuantRows * sizeof(float));
  each_unit<Unit>(matrix, panel, [&](const Unit& unit, int64_t index) {
    run[count++].open(unit);
    if (count < kRunUnits && (index + 1) * kUnitColumns < matrix.columns) return;
    multiply_run(run, count, block, index + 1 - count, sums);
    count = 0;
  });
}

// How panels are multiplied: by tiles.
struct TileProducts {
  template <class Unit>
  static constexpr MultiplyPanel multiply_panel = quant_tile_panel<Unit>;
};

// As quant_rows, in a job whose tiles are those of configure_tiles.
inline void quant_tile_rows(const Linear& linear, const void* prepared, void* scratch, int64_t first_row, int64_t end_row) {
  if (linear.num_tokens < kMatrixTokens) return quant_rows<VectorProducts>(linear, prepared, scratch, first_row, end_row);
  configure_quant_tiles();
  quant_rows<TileProducts>(linear, prepared, scratch, first_row, end_row);
  configure_tiles();
}

#undef SHUTEYE_STORE_PRODUCT

} // namespace SHUTEYE_ISA
