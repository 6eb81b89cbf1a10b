// Products of many tokens with AMX: sums[16 tokens, 16 rows] += x[16 tokens, 32] weight[16 rows, 32]^T, two by two tiles
// at a time, so that each tile that is read is multiplied twice. Knows nothing of threads.
//
// Both sides are copied into tiles of 1 KiB first: x once for all threads, as [tokens / 16][steps][16 tokens][32], weights
// a group of rows at a time, as [rows / 16][steps][16 pairs][16 rows] of pairs. A step is 32 elements of depth. Depth is
// cut into chunks of which a group of weights fits into L2; sums of a chunk wait there for the next one.
//
// Tiles leave the vector unit idle: a block's sums are finished while the next block is multiplied.
#pragma once
#include "linear.h"
#include "tiles.h"

namespace SHUTEYE_ISA {

using shuteye::kGroupTiles;
using shuteye::kMaxChunkSteps;

constexpr int64_t kBlock = 32; // tokens, and rows, of two by two tiles
constexpr int64_t kBlockSums = kBlock * kBlock;

struct Depth {
  int64_t steps;
  int64_t chunks;
  int64_t chunk_steps; // of all chunks but perhaps the last

  explicit Depth(int64_t in_features) {
    steps = shuteye::round_up(in_features, 32) / 32;
    chunks = (steps + kMaxChunkSteps - 1) / kMaxChunkSteps;
    chunk_steps = (steps + chunks - 1) / chunks;
  }
};

// Weight tiles of a group, then the sums of all tokens and the group's rows, if there is more than one chunk.
struct ManyScratch {
  bf16* weight;
  float* sums;

  explicit ManyScratch(void* memory) {
    weight = static_cast<bf16*>(memory);
    sums = reinterpret_cast<float*>(weight + kGroupTiles * kMaxChunkSteps * kTileElements);
  }
};

// Tokens of tiles [first, end), normalised if that is wanted. What is no token and no feature is zero.
inline void pack_tokens(const Linear& linear, void* packed, void* scratch, int64_t first, int64_t end) {
  const int64_t steps = Depth(linear.in_features).steps;
  const bool as_it_is = !linear.norm && linear.in_features == steps * 32;
  for (int64_t token = first * 16; token < end * 16; token++) {
    bf16* target = static_cast<bf16*>(packed) + shuteye::packed_offset(token, 0, steps * 32);
    const bool is_token = token < linear.num_tokens;
    const bf16* row = is_token && as_it_is ? row_of<bf16>(linear, token) : static_cast<const bf16*>(scratch);
    if (is_token && !as_it_is) copy_row<bf16>(linear, token, static_cast<bf16*>(scratch), steps * 32);
    for (int64_t step = 0; step < steps; step++) {
      _mm512_storeu_si512(target + step * kTileElements,
                          is_token ? _mm512_loadu_si512(row + step * 32) : _mm512_setzero_si512());
    }
  }
  finish_stores(packed);
}

// Steps [first, first + count) of 16 rows of weight, of which `num_rows` exist.
template <bool whole>
inline void pack_weight_steps(const Linear& linear, const bf16* source, int64_t num_rows, int64_t first, int64_t count, bf16* packed) {
  for (int64_t step = first; step < first + count; step++, packed += kTileElements) {
    const int64_t width = smaller<int64_t>(32, linear.in_features - step * 32);
    const __mmask32 mask = width == 32 ? ~0u : (1u << width) - 1u;
    __m512i rows[16];
    for (int64_t each = 0; each < 16; each++) {
      const bf16* row = source + each * linear.in_features + step * 32;
      if constexpr (whole) {
        rows[each] = _mm512_loadu_si512(row);
        __builtin_prefetch(row + 16 * linear.in_features, 0, 2); // the next tile's
      } else {
        rows[each] = each < num_rows ? _mm512_maskz_loadu_epi16(mask, row) : _mm512_setzero_si512();
      }
    }
    transpose(rows);
    for (int64_t pair = 0; pair < 16; pair++) _mm512_storeu_si512(packed + pair * 32, rows[pair]);
  }
}

inline void pack_weight_tile(const Linear& linear, int64_t row, int64_t num_rows, int64_t first, int64_t count, bf16* packed) {
  const bf16* source = static_cast<const bf16*>(linear.weight) + row * linear.in_features;
  if (num_rows == 16 && linear.in_features % 32 == 0)
    pack_weight_steps<true>(linear, source, num_rows, first, count, packed);
  else
    pack_weight_steps<false>(linear, source, num_rows, first, count, packed);
}

struct Block {
  const bf16* x;        // of the first token tile and step
  const bf16* weight;   // of the first weight tile and step
  int64_t x_stride;     // elements from one token tile to the next
  int64_t weight_stride;
  int64_t steps;
  int64_t step = kTileElements; // elements from one step to the next

  Block backwards() const {
    const int64_t last = (steps - 1) * step;
    return {x + last, weight + last, x_stride, weight_stride, steps, -step};
  }
};

// sums[32 tokens, 32 rows] in tiles 0 to 3, one or two tiles each way; aside() after each step.
template <int token_tiles, int row_tiles, class Aside>
inline void multiply(const Block& block, const float* before, float* sums, const Aside& aside) {
  constexpr int64_t stride = kBlock * sizeof(float);
  if (before) {
    _tile_loadd(0, before, stride);
    if constexpr (row_tiles > 1) _tile_loadd(1, before + 16, stride);
    if constexpr (token_tiles > 1) _tile_loadd(2, before + 16 * kBlock, stride);
    if constexpr (token_tiles > 1 && row_tiles > 1) _tile_loadd(3, before + 16 * kBlock + 16, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < block.steps; step++) {
    const bf16* x = block.x + step * block.step;
    const bf16* weight = block.weight + step * block.step;
    _tile_loadd(4, x, 64);
    _tile_loadd(6, weight, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (row_tiles > 1) {
      _tile_loadd(7, weight + block.weight_stride, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (token_tiles > 1) {
      _tile_loadd(5, x + block.x_stride, 64);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (row_tiles > 1) _tile_dpbf16ps(3, 5, 7);
    }
    aside();
  }
  _tile_stored(0, sums, stride);
  if constexpr (row_tiles > 1) _tile_stored(1, sums + 16, stride);
  if constexpr (token_tiles > 1) _tile_stored(2, sums + 16 * kBlock, stride);
  if constexpr (token_tiles > 1 && row_tiles > 1) _tile_stored(3, sums + 16 * kBlock + 16, stride);
  finish_stores(sums);
}

template <class Aside>
inline void multiply_some(const Block& block, bool two_token_tiles, bool two_row_tiles, const float* before, float* sums,
                          const Aside& aside) {
  if (two_token_tiles) {
    return two_row_tiles ? multiply<2, 2>(block, before, sums, aside) : multiply<2, 1>(block, before, sums, aside);
  }
  two_row_tiles ? multiply<1, 2>(block, before, sums, aside) : multiply<1, 1>(block, before, sums, aside);
}

// The weight rows that are packed together: of silu_mul, tiles of gate and up in turn.
struct Group {
  const Linear& linear;
  int64_t first_row; // of out
  int64_t num_rows;
  int64_t num_tiles;

  Group(const Linear& of, int64_t first, int64_t end) : linear(of), first_row(first), num_rows(end - first) {
    num_tiles = shuteye::round_up(num_rows, 16) / 16 * (paired() ? 2 : 1);
  }
  bool paired() const { return linear.finish == Finish::silu_mul; }
  int64_t offset_of(int64_t tile) const { return (paired() ? tile / 2 : tile) * 16; }
  int64_t rows_of(int64_t tile) const { return smaller<int64_t>(16, num_rows - offset_of(tile)); }
  int64_t weight_row(int64_t tile) const {
    return first_row + offset_of(tile) + (paired() && tile % 2 ? linear.out_features : 0);
  }
};

// What is left to finish of a block of sums.
template <Finish finish>
class Unfinished {
 public:
  Unfinished() = default;
  Unfinished(const Group& group, int64_t tile, const float* sums, TokenRange tokens)
      : sums_(sums),
        tokens_(tokens),
        row_(group.first_row + group.offset_of(tile)),
        num_rows_(group.rows_of(tile)),
        more_rows_(group.paired() || tile + 1 == group.num_tiles ? 0 : group.rows_of(tile + 1)) {}

  void some(const Linear& linear, int64_t num_tokens) {
    if (tokens_.count == 0) return;
    const TokenRange now{tokens_.first, smaller(num_tokens, tokens_.count)};
    const Sums lower{sums_, kBlock}, upper{sums_ + 16, kBlock};
    finish_as<bf16, finish>(linear, lower, upper, row_, num_rows_, now);
    if (more_rows_) finish_as<bf16, finish>(linear, upper, upper, row_ + 16, more_rows_, now);
    sums_ += now.count * kBlock;
    tokens_ = {now.first + now.count, tokens_.count - now.count};
  }
  void all(const Linear& linear) { some(linear, tokens_.count); }

 private:
  const float* sums_ = nullptr; // of the first token that is left
  TokenRange tokens_{0, 0};
  int64_t row_ = 0;       // of out
  int64_t num_rows_ = 0;  // of the first tile
  int64_t more_rows_ = 0; // of the second, unless it is one of up
};

template <Finish finish>
inline void compute_group(const Group& group, const bf16* packed, const ManyScratch& scratch) {
  const Linear& linear = group.linear;
  const Depth depth(linear.in_features);
  const int64_t token_tiles = shuteye::round_up(linear.num_tokens, 16) / 16;
  alignas(64) float own[2][kBlockSums]; // the block that is multiplied and the one that is finished, in turn
  int64_t turn = 0;
  const bool alternates = linear.unit_rows % kBlock == 0; // then the same tiles of weights always meet in a block
  Unfinished<finish> unfinished;
  for (int64_t first = 0; first < depth.steps; first += depth.chunk_steps) {
    const int64_t steps = smaller(depth.chunk_steps, depth.steps - first);
    const bool is_last = first + steps == depth.steps;
    const int64_t tokens_per_step = (kBlock + steps - 1) / steps;
    for (int64_t tile = 0; tile < group.num_tiles; tile++) {
      pack_weight_tile(linear, group.weight_row(tile), group.rows_of(tile), first, steps,
                       scratch.weight + tile * steps * kTileElements);
    }
    finish_stores(scratch.weight);
    float* kept = scratch.sums;
    for (int64_t token_tile = 0; token_tile < token_tiles; token_tile += 2) {
      for (int64_t tile = 0; tile < group.num_tiles; tile += 2, kept += kBlockSums) {
        const Block block{packed + (token_tile * depth.steps + first) * kTileElements,
                          scratch.weight + tile * steps * kTileElements, depth.steps * kTileElements,
                          steps * kTileElements, steps};
        const bool backwards = alternates && tile / 2 % 2; // the tokens that were read last are still near
        float* sums = is_last ? own[turn] : kept;
        multiply_some(backwards ? block.backwards() : block, token_tile + 1 < token_tiles, tile + 1 < group.num_tiles,
                      first ? kept : nullptr, sums, [&] { unfinished.some(linear, tokens_per_step); });
        if (!is_last) continue;
        const int64_t token = token_tile * 16;
        unfinished = Unfinished<finish>(group, tile, sums, {token, smaller(kBlock, linear.num_tokens - token)});
        turn = 1 - turn;
      }
    }
  }
  unfinished.all(linear);
}

template <Finish finish>
inline void compute_groups(const Linear& linear, const void* packed, void* memory, int64_t first_row, int64_t end_row) {
  const int64_t step = kGroupTiles * 16 / (finish == Finish::silu_mul ? 2 : 1);
  for (int64_t row = first_row; row < end_row; row += step) {
    const Group group(linear, row, smaller(row + step, end_row));
    compute_group<finish>(group, static_cast<const bf16*>(packed), ManyScratch(memory));
  }
}

inline void many_rows(const Linear& linear, const void* packed, void* memory, int64_t first_row, int64_t end_row) {
  with_finish(linear.finish, [&](auto tag) {
    compute_groups<decltype(tag)::finish>(linear, packed, memory, first_row, end_row);
  });
}

} // namespace SHUTEYE_ISA
