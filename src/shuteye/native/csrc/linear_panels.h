// Products with panels of 32 rows: outer products in registers, tiles of tokens by vectors of rows, column by column (or
// pair by pair). Knows nothing of threads.
//
// A panel of bfloat16, [pairs of columns][32 rows][2], is multiplied where it lies; where there is no product of pairs, they
// are widened in registers. Row-major weights are turned into such a panel first, or of float, [columns][32 rows], chunk by
// chunk. A chunk of a panel stays in L1 while all tiles of tokens meet it.
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

// totals += a column of weights, vector(index) of 16 rows or fewer each, times a column of tokens.
template <int num_tokens, int num_vectors, class Vector>
SHUTEYE_INLINE void add_column(const Vector& vector, const float* x, Totals<num_tokens, num_vectors>& totals) {
  if constexpr (num_tokens < num_vectors) {
    Lanes factors[num_tokens];
    for (int token = 0; token < num_tokens; token++) factors[token] = broadcast(x[token]);
    for (int index = 0; index < num_vectors; index++) {
      const Lanes own = vector(index);
      for (int token = 0; token < num_tokens; token++) add_product(own, factors[token], totals[token][index]);
    }
  } else {
    Lanes own[num_vectors];
    for (int index = 0; index < num_vectors; index++) own[index] = vector(index);
    for (int token = 0; token < num_tokens; token++) {
      const Lanes factor = broadcast(x[token]);
      for (int index = 0; index < num_vectors; index++) add_product(own[index], factor, totals[token][index]);
    }
  }
}

// What weights are multiplied as: W, what a pair of columns of 32 rows consists of, and X, likewise of tokens; 64 of W, and
// two of X for each token.

// Columns of float.
struct FloatColumns {
  using W = float;
  using X = float;
  static constexpr int max_tokens = 6;
  static constexpr int max_sums = 12; // of 16 registers
  static constexpr int64_t most_columns = 128; // of a chunk: 16 KiB, that stay in L1
  template <int num_tokens, int num_vectors>
  SHUTEYE_INLINED static void add(const float* weight, const float* x, Totals<num_tokens, num_vectors>& totals) {
    add_column([&](int index) SHUTEYE_INLINED { return load(weight + index * Lanes::width); }, x, totals);
    weight += kPanelRows;
    add_column([&](int index) SHUTEYE_INLINED { return load(weight + index * Lanes::width); }, x + num_tokens, totals);
  }
};

// Pairs of bfloat16, widened in registers: that takes no longer than to read them, and is hidden behind the products.
struct WidenedPairs {
  using W = bf16;
  using X = float;
  static constexpr int max_tokens = 6;
  static constexpr int max_sums = 12;
  static constexpr int64_t most_columns = 192; // 12 KiB: with the next chunk and a tile's tokens they fit L1
  template <int num_tokens, int num_vectors>
  SHUTEYE_INLINED static void add(const bf16* weight, const float* x, Totals<num_tokens, num_vectors>& totals) {
    add_column([&](int index) SHUTEYE_INLINED { return load_even(weight + index * 2 * Lanes::width); }, x, totals);
    add_column([&](int index) SHUTEYE_INLINED { return load_odd(weight + index * 2 * Lanes::width); }, x + num_tokens, totals);
  }
};

#if defined(SHUTEYE_LANES_AVX512)
// Pairs of bfloat16, multiplied and added at once.
struct Bf16Pairs {
  using W = bf16;
  using X = bf16;
  static constexpr int max_tokens = 12;
  static constexpr int max_sums = 24; // of 32 registers
  static constexpr int64_t most_columns = 2048; // of panels, all: 12 tokens hide what comes from L2
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
};
#endif

// --- chunks ---------------------------------------------------------------------------------------

// Columns of each chunk but perhaps the last; chunks are as alike as possible.
template <class Weights>
int64_t chunk_columns(int64_t depth) {
  const int64_t count = (depth + Weights::most_columns - 1) / Weights::most_columns;
  return round_up((depth + count - 1) / count, shuteye::kDepthStep);
}

// Words of four bytes, as floats: columns of float, or pairs of columns of bfloat16. What does not exist is zero.
template <class T>
inline Lanes load_words(const T* row, int64_t num_columns) {
  constexpr int64_t most = Lanes::width * sizeof(float) / sizeof(T);
  if (num_columns >= most) return load(reinterpret_cast<const float*>(row));
  T columns[most] = {};
  memcpy(columns, row, num_columns * sizeof(T));
  return load(reinterpret_cast<const float*>(columns));
}

// Columns [first, first + count) of 32 row-major rows, as a panel; what does not exist is zero. As much of the next 32 rows is
// fetched into L2 meanwhile, in the order of addresses: processors do not foresee eight rows or more at once.
template <class T>
inline void turn(const ShuteyeMatrix& matrix, int64_t row, int64_t first, int64_t count, T* block) {
  constexpr int64_t word_columns = sizeof(float) / sizeof(T);
  const T* ahead = static_cast<const T*>(matrix.data) + (row + kPanelRows) * matrix.columns + first * kPanelRows;
  for (int64_t own = 0; own < kPanelRows; own += Lanes::width) {
    for (int64_t column = 0; column < count; column += Lanes::width * word_columns) {
      Lanes words[Lanes::width];
      for (int64_t each = 0; each < Lanes::width; each++) {
        const int64_t source = row + own + each, left = matrix.columns - first - column;
        const T* begin = static_cast<const T*>(matrix.data) + source * matrix.columns + first + column;
        words[each] = source < matrix.rows && left > 0 ? load_words(begin, left) : broadcast(0.0f);
      }
      for (int64_t line = 0; line < Lanes::width * Lanes::width / 16; line++, ahead += 64 / sizeof(T)) {
        __builtin_prefetch(ahead, 0, 2);
      }
      transpose(words);
      for (int64_t each = 0; each < smaller<int64_t>(Lanes::width, (count - column) / word_columns); each++) {
        store(reinterpret_cast<float*>(block + (column + each * word_columns) * kPanelRows) + own, words[each]);
      }
    }
  }
}

// --- tokens ---------------------------------------------------------------------------------------

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

// block[word][token] = rows[token][word], of words of four bytes: columns of float, or pairs of columns of bfloat16. Stores
// whole vectors, of which the next word overwrites what is too much.
inline void place_words(const float* rows, int64_t stride, int64_t num_tokens, int64_t num_words, float* block) {
  const float* end = block + num_words * num_tokens;
  for (int64_t first = 0; first < num_tokens; first += Lanes::width) {
    const int64_t count = smaller<int64_t>(Lanes::width, num_tokens - first);
    float* target = block + first;
    for (int64_t word = 0; word < num_words; word += Lanes::width) {
      Lanes words[Lanes::width];
      for (int64_t each = 0; each < Lanes::width; each++) {
        words[each] = each < count ? load(rows + (first + each) * stride + word) : broadcast(0.0f);
      }
      transpose(words);
      for (const Lanes& own : words) {
        if (num_tokens <= Lanes::width && end - target >= Lanes::width) store(target, own);
        else store_partial(target, own, count);
        target += num_tokens;
      }
    }
  }
}

// scratch: the rows of a tile's tokens.
template <class T, class Weights>
void prepare_panel_tokens(const Linear& linear, void* prepared, void* scratch, int64_t first_tile, int64_t end_tile) {
  using X = typename Weights::X;
  constexpr int64_t word_columns = sizeof(float) / sizeof(X);
  const TokenTiles tiles(linear.num_tokens, Weights::max_tokens);
  const int64_t depth = round_up(linear.in_features, shuteye::kDepthStep), chunk = chunk_columns<Weights>(depth);
  auto* rows = static_cast<X*>(scratch);
  for (int64_t tile = first_tile; tile < end_tile; tile++) {
    const TokenRange tokens = tiles[tile];
    for (int64_t index = 0; index < tokens.count; index++) copy_row<T>(linear, tokens.first + index, rows + index * depth, depth);
    for (int64_t first = 0; first < depth; first += chunk) {
      const int64_t columns = smaller(chunk, depth - first);
      auto* block = static_cast<X*>(prepared) + first * linear.num_tokens + tokens.first * columns;
      place_words(reinterpret_cast<const float*>(rows + first), depth / word_columns, tokens.count, columns / word_columns,
                  reinterpret_cast<float*>(block));
    }
  }
}

// --- products -------------------------------------------------------------------------------------

// Cache lines that are fetched into L1 meanwhile: a tile's share of the next chunk. Processors do not foresee what is read:
// a tile of more than kSequentialTokens goes through a chunk twice, each time through every other line.
struct FetchAhead {
  const char* begin;
  int64_t lines;
};
constexpr int64_t kSequentialTokens = 3;

// sums[token, 32 rows] of a tile of tokens and a chunk; they are added to what was there if it `goes_on`.
template <class Weights, int num_tokens>
void multiply_tile(const typename Weights::W* weight, const typename Weights::X* x, int64_t num_pairs, bool goes_on, FetchAhead ahead,
                   float* sums) {
  constexpr int most = Weights::max_sums / num_tokens;
  constexpr int num_vectors = most >= kVectors ? kVectors : most >= 4 ? 4 : most >= 2 ? 2 : 1;
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
    int64_t pair = 0;
    for (; pair < num_pairs && ahead.lines > 0; pair++, ahead.lines--, ahead.begin += 64) {
      __builtin_prefetch(ahead.begin);
      step();
    }
    for (; pair < num_pairs; pair++) step();
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

// sums[token, 32 rows] of a panel and all tokens; row-major weights are turned into `block`.
template <class Weights>
void multiply_panel(const Linear& linear, const ShuteyeMatrix& matrix, const void* prepared, int64_t row, void* block, float* sums) {
  using W = typename Weights::W;
  const bool is_panel = shuteye::form_of(matrix.kind) == shuteye::kPanelsForm;
  const int64_t depth = round_up(linear.in_features, shuteye::kDepthStep), chunk = chunk_columns<Weights>(depth);
  const auto* x = static_cast<const typename Weights::X*>(prepared);
  const TokenTiles tiles(linear.num_tokens, Weights::max_tokens);
  for (int64_t first = 0; first < depth; first += chunk) {
    const int64_t columns = smaller(chunk, depth - first);
    const W* weight = static_cast<const W*>(matrix.data) + row * depth + first * kPanelRows;
    FetchAhead ahead{};
    if (is_panel && linear.num_tokens > kSequentialTokens) {
      ahead = {reinterpret_cast<const char*>(weight + columns * kPanelRows), (columns + tiles.count - 1) / tiles.count};
    }
    if (!is_panel) {
      turn(matrix, row, first, columns, static_cast<W*>(block));
      weight = static_cast<const W*>(block);
    }
    for (int64_t tile = 0; tile < tiles.count; tile++, ahead.begin += ahead.lines * 64) {
      const TokenRange tokens = tiles[tile];
      multiply_by<Weights>(tokens.count, weight, x + first * linear.num_tokens + tokens.first * columns, columns / 2, first > 0,
                           ahead, sums + tokens.first * kPanelRows);
    }
  }
}

// scratch: two panels' sums, and a chunk of weights.
template <class T, class Weights>
void panel_rows(const Linear& linear, const void* prepared, void* scratch, int64_t first_row, int64_t end_row) {
  float* lower = static_cast<float*>(scratch);
  float* upper = lower + linear.num_tokens * kPanelRows;
  void* block = upper + linear.num_tokens * kPanelRows;
  for (int64_t row = first_row; row < end_row; row += kPanelRows) {
    multiply_panel<Weights>(linear, linear.weight, prepared, row, block, lower);
    if (linear.finish == Finish::silu_mul) multiply_panel<Weights>(linear, linear.upper, prepared, row, block, upper);
    finish_tile<T>(linear, {lower, kPanelRows}, {upper, kPanelRows}, row, smaller(kPanelRows, end_row - row),
                   {0, linear.num_tokens});
  }
}

template <class T_, class Weights_>
struct WeightsTag {
  using T = T_;
  using Weights = Weights_;
};

// body(tag): of what type the model is, and what is multiplied. `Pairs`: of bfloat16, in a model of that type.
template <class Pairs, class Body>
auto with_weights(const Linear& linear, const Body& body) {
  if (linear.dtype == SHUTEYE_BFLOAT16) return body(WeightsTag<bf16, Pairs>{});
  if (shuteye::form_of(linear.weight.kind) == shuteye::kPanelsForm) return body(WeightsTag<float, WidenedPairs>{});
  return body(WeightsTag<float, FloatColumns>{});
}

template <class Pairs>
shuteye::LinearKernels panel_kernels() {
  return {[](const Linear& linear) {
            return with_weights<Pairs>(linear, [&](auto tag) {
              return TokenTiles(linear.num_tokens, decltype(tag)::Weights::max_tokens).count;
            });
          },
          [](const Linear& linear, void* prepared, void* scratch, int64_t first, int64_t end) {
            with_weights<Pairs>(linear, [&](auto tag) {
              using Tag = decltype(tag);
              prepare_panel_tokens<typename Tag::T, typename Tag::Weights>(linear, prepared, scratch, first, end);
            });
          },
          [](const Linear& linear, const void* prepared, void* scratch, int64_t first, int64_t end) {
            with_weights<Pairs>(linear, [&](auto tag) {
              using Tag = decltype(tag);
              panel_rows<typename Tag::T, typename Tag::Weights>(linear, prepared, scratch, first, end);
            });
          }};
}

} // namespace SHUTEYE_ISA
