// Products with panels of 32 rows: outer products in registers, tiles of tokens by vectors of rows, column by column (or
// pair by pair). Knows nothing of threads.
//
// A panel of bfloat16, [pairs of columns][32 rows][2], is multiplied as it is where pairs can be, or where it is read but
// once. Else a chunk of it is widened to float, [columns][32 rows], so that it is read from memory once, in order, and stays
// in L1 while all tiles of tokens meet it. Row-major weights become such chunks too.
//
// Whatever the tiles and chunks, a sum takes its products in the order of the columns: the bits of a token do not depend on
// how many others there are.
//
// Tokens are prepared chunk by chunk: of each, one block for each tile, [columns][tokens of the tile] of float, or
// [pairs][tokens][2] of bfloat16.
#pragma once
#include "constants.h"
#include "linear.h"
#include "transpose.h"

namespace SHUTEYE_ISA {

using shuteye::kPanelRows;

constexpr int kVectors = kPanelRows / Lanes::width;

// Sums of a tile of tokens and some vectors of rows.
template <int num_tokens, int num_vectors>
using Totals = Lanes[num_tokens][num_vectors];

// What weights are multiplied as: W, what a pair of columns of 32 rows consists of, and X, likewise of tokens; 64 of W, and
// two of X for each token.

// Columns of float.
struct FloatColumns {
  using W = float;
  using X = float;
  static constexpr int max_tokens = 6;
  static constexpr int max_sums = 12; // of 16 registers
  static constexpr int64_t chunk = 128; // columns: they stay in L1
  template <int num_tokens, int num_vectors>
  SHUTEYE_INLINED static void add(const float* weight, const float* x, Totals<num_tokens, num_vectors>& totals) {
    add_column(weight, x, totals);
    add_column(weight + kPanelRows, x + num_tokens, totals);
  }
  template <int num_tokens, int num_vectors>
  SHUTEYE_INLINED static void add_column(const float* weight, const float* x, Totals<num_tokens, num_vectors>& totals) {
    if constexpr (num_tokens < num_vectors) {
      Lanes factors[num_tokens];
      for (int token = 0; token < num_tokens; token++) factors[token] = broadcast(x[token]);
      for (int vector = 0; vector < num_vectors; vector++) {
        const Lanes own = load(weight + vector * Lanes::width);
        for (int token = 0; token < num_tokens; token++) add_product(own, factors[token], totals[token][vector]);
      }
    } else {
      Lanes own[num_vectors];
      for (int vector = 0; vector < num_vectors; vector++) own[vector] = load(weight + vector * Lanes::width);
      for (int token = 0; token < num_tokens; token++) {
        const Lanes factor = broadcast(x[token]);
        for (int vector = 0; vector < num_vectors; vector++) add_product(own[vector], factor, totals[token][vector]);
      }
    }
  }
  static void place(float* block, int64_t token, int64_t num_tokens, const float* row, int64_t count) {
    for (int64_t column = 0; column < count; column++) block[column * num_tokens + token] = row[column];
  }
};

// Pairs of bfloat16, widened in registers: for tokens that are all in one tile of few.
struct WidenedPairs {
  using W = bf16;
  using X = float;
  static constexpr int max_tokens = 2;
  static constexpr int max_sums = 8;
  template <int num_tokens, int num_vectors>
  SHUTEYE_INLINED static void add(const bf16* weight, const float* x, Totals<num_tokens, num_vectors>& totals) {
    Lanes factors[2][num_tokens];
    for (int token = 0; token < num_tokens; token++) {
      factors[0][token] = broadcast(x[token]);
      factors[1][token] = broadcast(x[num_tokens + token]);
    }
    for (int vector = 0; vector < num_vectors; vector++, weight += 2 * Lanes::width) {
      const Lanes even = load_even(weight), odd = load_odd(weight);
      for (int token = 0; token < num_tokens; token++) add_product(even, factors[0][token], totals[token][vector]);
      for (int token = 0; token < num_tokens; token++) add_product(odd, factors[1][token], totals[token][vector]);
    }
  }
};

#if defined(SHUTEYE_LANES_AVX512)
// Pairs of bfloat16, multiplied and added at once.
struct Bf16Pairs {
  using W = bf16;
  using X = bf16;
  static constexpr int max_tokens = 12;
  static constexpr int max_sums = 24; // of 32 registers
  static constexpr int64_t chunk = 2048; // columns: for row-major weights alone, panels are read where they lie
  template <int num_tokens, int num_vectors>
  SHUTEYE_INLINED static void add(const bf16* weight, const bf16* x, Totals<num_tokens, num_vectors>& totals) {
    __m512bh own[num_vectors];
    for (int vector = 0; vector < num_vectors; vector++) {
      own[vector] = (__m512bh)_mm512_loadu_si512(weight + vector * 2 * Lanes::width);
    }
    for (int token = 0; token < num_tokens; token++) {
      int both;
      memcpy(&both, x + 2 * token, sizeof both);
      const auto factors = (__m512bh)_mm512_set1_epi32(both);
      for (int vector = 0; vector < num_vectors; vector++) {
        totals[token][vector].v = _mm512_dpbf16_ps(totals[token][vector].v, own[vector], factors);
      }
    }
  }
  static void place(bf16* block, int64_t token, int64_t num_tokens, const bf16* row, int64_t count) {
    for (int64_t column = 0; column < count; column += 2) memcpy(block + column * num_tokens + 2 * token, row + column, 4);
  }
};
#endif

// --- chunks of weights ----------------------------------------------------------------------------

inline void widen(const bf16* panel, int64_t num_pairs, float* columns) {
  for (int64_t pair = 0; pair < num_pairs; pair++, panel += 2 * kPanelRows, columns += 2 * kPanelRows) {
    for (int vector = 0; vector < kVectors; vector++) {
      store(columns + vector * Lanes::width, load_even(panel + vector * 2 * Lanes::width));
      store(columns + kPanelRows + vector * Lanes::width, load_odd(panel + vector * 2 * Lanes::width));
    }
  }
}

// Words of four bytes, as floats: columns of float, or pairs of columns of bfloat16.
template <class T>
inline Lanes load_words(const T* row, int64_t num_columns, float) { // widened
  return num_columns >= Lanes::width ? load(row) : load_partial(row, num_columns);
}
template <class T>
inline Lanes load_words(const T* row, int64_t num_columns, bf16) {
  T pairs[2 * Lanes::width] = {};
  memcpy(pairs, row, smaller<int64_t>(num_columns, 2 * Lanes::width) * sizeof(T));
  float words[Lanes::width];
  memcpy(words, pairs, sizeof words);
  return load(words);
}

// Columns [first, first + count) of 32 row-major rows, as W; what does not exist is zero.
template <class T, class W>
inline void turn(const ShuteyeMatrix& matrix, int64_t row, int64_t first, int64_t count, W* block) {
  constexpr int64_t word_columns = sizeof(float) / sizeof(W);
  for (int64_t own = 0; own < kPanelRows; own += Lanes::width) {
    for (int64_t column = 0; column < count; column += Lanes::width * word_columns) {
      Lanes words[Lanes::width];
      for (int64_t each = 0; each < Lanes::width; each++) {
        const int64_t source = row + own + each, left = matrix.columns - first - column;
        const T* begin = static_cast<const T*>(matrix.data) + source * matrix.columns + first + column;
        words[each] = source < matrix.rows && left > 0 ? load_words(begin, left, W{}) : broadcast(0.0f);
        __builtin_prefetch(begin + Lanes::width * matrix.columns); // what the next rows have there
      }
      transpose(words);
      for (int64_t each = 0; each < smaller<int64_t>(Lanes::width, (count - column) / word_columns); each++) {
        store(reinterpret_cast<float*>(block + (column + each * word_columns) * kPanelRows) + own, words[each]);
      }
    }
  }
}

// --- products -------------------------------------------------------------------------------------

// What is fetched into L1 meanwhile: a tile's share of what the next chunk is made of.
struct FetchAhead {
  const char* begin; // null: nothing
  int64_t nbytes;
};

// sums[token, 32 rows] of a tile of tokens and a chunk; they are added to what was there if it `goes_on`.
template <class Weights, int num_tokens>
void multiply_tile(const typename Weights::W* weight, const typename Weights::X* x, int64_t num_pairs, bool goes_on, FetchAhead ahead,
                   float* sums) {
  constexpr int most = Weights::max_sums / num_tokens;
  constexpr int num_vectors = most >= kVectors ? kVectors : most >= 4 ? 4 : most >= 2 ? 2 : 1;
  const int64_t share = ahead.nbytes / (kVectors / num_vectors) / num_pairs; // for each step
  const char* fetched = ahead.begin;
  for (int first = 0; first < kVectors; first += num_vectors) {
    Totals<num_tokens, num_vectors> totals;
    float* place = sums + first * Lanes::width;
    for (int token = 0; token < num_tokens; token++)
      for (int vector = 0; vector < num_vectors; vector++)
        totals[token][vector] = goes_on ? load(place + token * kPanelRows + vector * Lanes::width) : broadcast(0.0f);
    const auto* own = weight + first * Lanes::width * (sizeof(float) / sizeof(*weight));
    const auto* factors = x;
    const auto step = [&]() SHUTEYE_INLINED {
      Weights::add(own, factors, totals);
      own += 2 * kPanelRows;
      factors += 2 * num_tokens;
    };
    if (fetched) {
      for (int64_t pair = 0; pair < num_pairs; pair++, fetched += share) {
        __builtin_prefetch(fetched);
        __builtin_prefetch(fetched + 64);
        step();
      }
    } else {
      for (int64_t pair = 0; pair < num_pairs; pair++) step();
    }
    for (int token = 0; token < num_tokens; token++)
      for (int vector = 0; vector < num_vectors; vector++)
        store(place + token * kPanelRows + vector * Lanes::width, totals[token][vector]);
  }
}

template <class Weights, int most = Weights::max_tokens>
void multiply_by(int64_t num_tokens, const typename Weights::W* weight, const typename Weights::X* x, int64_t num_pairs,
                 bool goes_on, FetchAhead ahead, float* sums) {
  if (num_tokens == most) return multiply_tile<Weights, most>(weight, x, num_pairs, goes_on, ahead, sums);
  if constexpr (most > 1) multiply_by<Weights, most - 1>(num_tokens, weight, x, num_pairs, goes_on, ahead, sums);
}

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

template <class T, class Weights>
void prepare_panel_tokens(const Linear& linear, void* prepared, void* scratch, int64_t first_tile, int64_t end_tile) {
  const TokenTiles tiles(linear.num_tokens, Weights::max_tokens);
  const int64_t depth = round_up(linear.in_features, shuteye::kDepthStep);
  auto* row = static_cast<typename Weights::X*>(scratch);
  for (int64_t tile = first_tile; tile < end_tile; tile++) {
    const TokenRange tokens = tiles[tile];
    for (int64_t index = 0; index < tokens.count; index++) {
      copy_row<T>(linear, tokens.first + index, row, depth);
      for (int64_t first = 0; first < depth; first += Weights::chunk) {
        const int64_t columns = smaller(Weights::chunk, depth - first);
        auto* block = static_cast<typename Weights::X*>(prepared) + first * linear.num_tokens + tokens.first * columns;
        Weights::place(block, index, tokens.count, row + first, columns);
      }
    }
  }
}

// sums[token, 32 rows] of a panel and all tokens. T: of row-major weights.
template <class T, class Weights>
void multiply_panel(const Linear& linear, const ShuteyeMatrix& matrix, const void* prepared, int64_t row, void* memory, float* sums) {
  using W = typename Weights::W;
  using X = typename Weights::X;
  const bool is_panel = shuteye::form_of(matrix.kind) == shuteye::kPanelsForm;
  const int64_t depth = round_up(linear.in_features, shuteye::kDepthStep);
  const bf16* panel = static_cast<const bf16*>(matrix.data) + row * depth;
  const auto* x = static_cast<const X*>(prepared);
  if constexpr (sizeof(W) == sizeof(float)) {
    if (is_panel && linear.num_tokens <= WidenedPairs::max_tokens)
      return multiply_by<WidenedPairs>(linear.num_tokens, panel, x, depth / 2, false, FetchAhead{}, sums);
  }
  const TokenTiles tiles(linear.num_tokens, Weights::max_tokens);
  W* block = static_cast<W*>(memory);
  for (int64_t first = 0; first < depth; first += Weights::chunk) {
    const int64_t columns = smaller(Weights::chunk, depth - first);
    const bf16* source = panel + first * kPanelRows;
    const W* weight = block;
    FetchAhead ahead{};
    if (!is_panel) {
      turn<T>(matrix, row, first, columns, block);
    } else if constexpr (sizeof(W) == sizeof(bf16)) {
      weight = source;
    } else {
      widen(source, columns / 2, block);
      ahead = {reinterpret_cast<const char*>(source + columns * kPanelRows), columns * kPanelRows * 2 / tiles.count};
    }
    for (int64_t tile = 0; tile < tiles.count; tile++, ahead.begin += ahead.nbytes) {
      const TokenRange tokens = tiles[tile];
      multiply_by<Weights>(tokens.count, weight, x + first * linear.num_tokens + tokens.first * columns, columns / 2, first > 0,
                           ahead, sums + tokens.first * kPanelRows);
    }
  }
}

template <class T, class Weights>
void panel_rows(const Linear& linear, const void* prepared, void* scratch, int64_t first_row, int64_t end_row) {
  float* lower = static_cast<float*>(scratch);
  float* upper = lower + linear.num_tokens * kPanelRows;
  void* block = upper + linear.num_tokens * kPanelRows;
  for (int64_t row = first_row; row < end_row; row += kPanelRows) {
    multiply_panel<T, Weights>(linear, linear.weight, prepared, row, block, lower);
    if (linear.finish == Finish::silu_mul) multiply_panel<T, Weights>(linear, linear.upper, prepared, row, block, upper);
    finish_tile<T>(linear, {lower, kPanelRows}, {upper, kPanelRows}, row, smaller(kPanelRows, end_row - row),
                   {0, linear.num_tokens});
  }
}

// `Weights`: what a model of bfloat16 multiplies.
template <class Weights>
shuteye::LinearKernels panel_kernels() {
  return {[](const Linear& linear) {
            return TokenTiles(linear.num_tokens, linear.dtype == SHUTEYE_BFLOAT16 ? Weights::max_tokens : FloatColumns::max_tokens).count;
          },
          [](const Linear& linear, void* prepared, void* scratch, int64_t first, int64_t end) {
            linear.dtype == SHUTEYE_BFLOAT16 ? prepare_panel_tokens<bf16, Weights>(linear, prepared, scratch, first, end)
                                             : prepare_panel_tokens<float, FloatColumns>(linear, prepared, scratch, first, end);
          },
          [](const Linear& linear, const void* prepared, void* scratch, int64_t first, int64_t end) {
            linear.dtype == SHUTEYE_BFLOAT16 ? panel_rows<bf16, Weights>(linear, prepared, scratch, first, end)
                                             : panel_rows<float, FloatColumns>(linear, prepared, scratch, first, end);
          }};
}

} // namespace SHUTEYE_ISA
