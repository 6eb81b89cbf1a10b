// Products with panels of 32 rows, [rows / 32][pairs of columns][32][2] of bfloat16: outer products in registers, tiles of
// tokens by vectors of rows, one pair of columns after the other. Knows nothing of threads.
//
// Whatever the shape of a tile, a sum takes its products in the order of the columns, one by one or pair by pair: the bits
// of a token do not depend on how many others there are.
//
// Tokens are prepared as one block for each tile, [pairs][what Pairs wants of a pair, for each token of the tile].
#pragma once
#include "linear.h"

namespace SHUTEYE_ISA {

using shuteye::kPanelRows;

// Both columns of a pair widened to float, one after the other.
struct FloatPairs {
  using X = float; // [pairs][2][tokens]
  static constexpr int max_tokens = 6;
  static constexpr int max_sums = 12; // of 16 registers
  template <int num_tokens, int num_vectors>
  static void multiply_add(const bf16* pair, const float* x, Lanes (&totals)[num_tokens][num_vectors]) {
    Lanes weight[num_vectors];
    for (int vector = 0; vector < num_vectors; vector++) weight[vector] = load_even(pair + vector * 2 * Lanes::width);
    add_column(weight, x, totals);
    for (int vector = 0; vector < num_vectors; vector++) weight[vector] = load_odd(pair + vector * 2 * Lanes::width);
    add_column(weight, x + num_tokens, totals);
  }
  template <int num_tokens, int num_vectors>
  static void add_column(const Lanes (&weight)[num_vectors], const float* x, Lanes (&totals)[num_tokens][num_vectors]) {
    for (int token = 0; token < num_tokens; token++) {
      const Lanes factor = broadcast(x[token]);
      for (int vector = 0; vector < num_vectors; vector++) {
        totals[token][vector] = fma(weight[vector], factor, totals[token][vector]);
      }
    }
  }
  static void place(float* block, int64_t token, int64_t num_tokens, const float* row, int64_t depth) {
    for (int64_t column = 0; column < depth; column++) block[column * num_tokens + token] = row[column];
  }
};

#if defined(SHUTEYE_LANES_AVX512)
// Both at once, nothing widened.
struct Bf16Pairs {
  using X = bf16; // [pairs][tokens][2]
  static constexpr int max_tokens = 12;
  static constexpr int max_sums = 24; // of 32 registers
  template <int num_tokens, int num_vectors>
  static void multiply_add(const bf16* pair, const bf16* x, Lanes (&totals)[num_tokens][num_vectors]) {
    __m512bh weight[num_vectors];
    for (int vector = 0; vector < num_vectors; vector++) {
      weight[vector] = (__m512bh)_mm512_loadu_si512(pair + vector * 2 * Lanes::width);
    }
    for (int token = 0; token < num_tokens; token++) {
      int both;
      memcpy(&both, x + 2 * token, sizeof both);
      const auto factors = (__m512bh)_mm512_set1_epi32(both);
      for (int vector = 0; vector < num_vectors; vector++) {
        totals[token][vector].v = _mm512_dpbf16_ps(totals[token][vector].v, weight[vector], factors);
      }
    }
  }
  static void place(bf16* block, int64_t token, int64_t num_tokens, const bf16* row, int64_t depth) {
    for (int64_t column = 0; column < depth; column += 2) memcpy(block + column * num_tokens + 2 * token, row + column, 4);
  }
};
#endif

// Tokens cut into as few tiles of at most `most` as possible, all alike.
struct TokenTiles {
  int64_t num_tokens;
  int64_t count;

  TokenTiles(int64_t tokens, int64_t most) : num_tokens(tokens), count((tokens + most - 1) / most) {}
  TokenRange operator[](int64_t tile) const {
    const int64_t first = tile * num_tokens / count;
    return {first, (tile + 1) * num_tokens / count - first};
  }
};

template <class T, class Pairs>
void prepare_panel_tokens(const Linear& linear, void* prepared, void* scratch, int64_t first_tile, int64_t end_tile) {
  const TokenTiles tiles(linear.num_tokens, Pairs::max_tokens);
  const int64_t depth = round_up(linear.in_features, shuteye::kDepthStep);
  auto* row = static_cast<typename Pairs::X*>(scratch);
  for (int64_t tile = first_tile; tile < end_tile; tile++) {
    const TokenRange tokens = tiles[tile];
    auto* block = static_cast<typename Pairs::X*>(prepared) + tokens.first * depth;
    for (int64_t index = 0; index < tokens.count; index++) {
      copy_row<T>(linear, tokens.first + index, row, depth);
      Pairs::place(block, index, tokens.count, row, depth);
    }
  }
}

// sums[token, 32 rows] of a tile of tokens and a panel.
template <class Pairs, int num_tokens>
void multiply_panel(const bf16* panel, const typename Pairs::X* x, int64_t num_pairs, float* sums) {
  constexpr int all_vectors = kPanelRows / Lanes::width;
  constexpr int most = Pairs::max_sums / num_tokens;
  constexpr int num_vectors = most >= all_vectors ? all_vectors : most >= 4 ? 4 : most >= 2 ? 2 : 1;
  for (int first = 0; first < all_vectors; first += num_vectors) {
    Lanes totals[num_tokens][num_vectors];
    for (auto& token : totals)
      for (Lanes& total : token) total = broadcast(0.0f);
    const bf16* pair = panel + first * 2 * Lanes::width;
    const typename Pairs::X* factors = x;
    for (int64_t index = 0; index < num_pairs; index++, pair += 2 * kPanelRows, factors += 2 * num_tokens) {
      Pairs::multiply_add(pair, factors, totals);
    }
    for (int token = 0; token < num_tokens; token++)
      for (int vector = 0; vector < num_vectors; vector++)
        store(sums + token * kPanelRows + (first + vector) * Lanes::width, totals[token][vector]);
  }
}

template <class Pairs, int most = Pairs::max_tokens>
void multiply_panel_by(int64_t num_tokens, const bf16* panel, const typename Pairs::X* x, int64_t num_pairs, float* sums) {
  if (num_tokens == most) return multiply_panel<Pairs, most>(panel, x, num_pairs, sums);
  if constexpr (most > 1) multiply_panel_by<Pairs, most - 1>(num_tokens, panel, x, num_pairs, sums);
}

template <class T, class Pairs>
void panel_rows(const Linear& linear, const void* prepared, void*, int64_t first_row, int64_t end_row) {
  const TokenTiles tiles(linear.num_tokens, Pairs::max_tokens);
  const int64_t depth = round_up(linear.in_features, shuteye::kDepthStep);
  alignas(64) float lower[Pairs::max_tokens * kPanelRows], upper[Pairs::max_tokens * kPanelRows];
  for (int64_t row = first_row; row < end_row; row += kPanelRows) {
    const int64_t num_rows = smaller(kPanelRows, end_row - row);
    const auto multiply = [&](const ShuteyeMatrix& matrix, TokenRange tokens, float* sums) {
      const auto* x = static_cast<const typename Pairs::X*>(prepared) + tokens.first * depth;
      multiply_panel_by<Pairs>(tokens.count, static_cast<const bf16*>(matrix.data) + row * depth, x, depth / 2, sums);
    };
    for (int64_t tile = 0; tile < tiles.count; tile++) {
      multiply(linear.weight, tiles[tile], lower);
      if (linear.finish == Finish::silu_mul) multiply(linear.upper, tiles[tile], upper);
      finish_tile<T>(linear, {lower, kPanelRows}, {upper, kPanelRows}, row, num_rows, tiles[tile]);
    }
  }
}

// `Pairs`: of a model of bfloat16.
template <class Pairs>
shuteye::LinearKernels panel_kernels() {
  return {[](const Linear& linear) {
            return TokenTiles(linear.num_tokens, linear.dtype == SHUTEYE_BFLOAT16 ? Pairs::max_tokens : FloatPairs::max_tokens).count;
          },
          [](const Linear& linear, void* prepared, void* scratch, int64_t first, int64_t end) {
            linear.dtype == SHUTEYE_BFLOAT16 ? prepare_panel_tokens<bf16, Pairs>(linear, prepared, scratch, first, end)
                                             : prepare_panel_tokens<float, FloatPairs>(linear, prepared, scratch, first, end);
          },
          [](const Linear& linear, const void* prepared, void* scratch, int64_t first, int64_t end) {
            linear.dtype == SHUTEYE_BFLOAT16 ? panel_rows<bf16, Pairs>(linear, prepared, scratch, first, end)
                                             : panel_rows<float, FloatPairs>(linear, prepared, scratch, first, end);
          }};
}

} // namespace SHUTEYE_ISA
