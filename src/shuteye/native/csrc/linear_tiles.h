// Products with AMX, of any number of tokens: sums[16 tokens, 16 rows] += x[16 tokens, 32] weight[16 rows, 32]^T, two by two
// tiles at a time, so that each tile that is read is multiplied twice. Knows nothing of threads.
//
// x is copied into tiles of 1 KiB first, [tokens / 16][steps][16 tokens][32]; a step is 32 elements of depth. A step of a
// panel, [16 pairs][32 rows], is two tiles side by side, read where they lie; row-major weights are copied to panels first,
// a group of rows at a time. Of many tokens, depth is cut into chunks, so that two tiles of tokens stay in L1 while they meet
// all rows of a group; sums of a chunk wait for the next one. None of this changes the order in which a sum is made.
//
// Tiles leave the vector unit idle: a block's sums are finished while the next block is multiplied.
#pragma once
#include "linear.h"
#include "tiles.h"

namespace SHUTEYE_ISA {

using shuteye::kGroupPanels;
using shuteye::kMaxChunkSteps;
using shuteye::kPanelRows;

constexpr int64_t kBlock = 32; // tokens, and rows, of two by two tiles
constexpr int64_t kBlockSums = kBlock * kBlock;
constexpr int64_t kStepElements = 2 * kTileElements; // of a panel

inline int64_t tiles_of_sixteen(const Linear& linear) { return (linear.num_tokens + 15) / 16; }

struct Depth {
  int64_t steps;
  int64_t chunk_steps; // of all chunks but perhaps the last

  explicit Depth(const Linear& linear) {
    steps = round_up(linear.in_features, 32) / 32;
    const bool whole = linear.num_tokens <= kBlock && shuteye::form_of(linear.weight.kind) == shuteye::kPanelsForm;
    const int64_t chunks = whole ? 1 : (steps + kMaxChunkSteps - 1) / kMaxChunkSteps;
    chunk_steps = (steps + chunks - 1) / chunks;
  }
};

// A group's row-major weights as panels, then the sums of all tokens and the group's rows, if there is more than one chunk.
struct GroupScratch {
  bf16* weight;
  float* sums;

  explicit GroupScratch(void* memory) {
    weight = static_cast<bf16*>(memory);
    sums = reinterpret_cast<float*>(weight + kGroupPanels * kMaxChunkSteps * kStepElements);
  }
};

// Tokens of tiles [first, end), normalised if that is wanted. What is no token and no feature is zero.
inline void pack_tokens(const Linear& linear, void* packed, void* scratch, int64_t first, int64_t end) {
  const int64_t steps = round_up(linear.in_features, 32) / 32;
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

// Steps [first, first + count) of 16 rows of weight, of which `num_rows` exist, to half a panel.
template <bool whole>
inline void pack_half_panel(const Linear& linear, const bf16* source, int64_t num_rows, int64_t first, int64_t count, bf16* half) {
  for (int64_t step = first; step < first + count; step++, half += kStepElements) {
    const int64_t width = smaller<int64_t>(32, linear.in_features - step * 32);
    const __mmask32 mask = width == 32 ? ~0u : (1u << width) - 1u;
    __m512i rows[16];
    for (int64_t each = 0; each < 16; each++) {
      const bf16* row = source + each * linear.in_features + step * 32;
      if constexpr (whole) {
        rows[each] = _mm512_loadu_si512(row);
        __builtin_prefetch(row + 16 * linear.in_features, 0, 2); // the next half's
      } else {
        rows[each] = each < num_rows ? _mm512_maskz_loadu_epi16(mask, row) : _mm512_setzero_si512();
      }
    }
    transpose(rows);
    for (int64_t pair = 0; pair < 16; pair++) _mm512_storeu_si512(half + pair * 2 * kPanelRows, rows[pair]);
  }
}

inline void pack_panel(const Linear& linear, const ShuteyeMatrix& matrix, int64_t row, int64_t first, int64_t count, bf16* panel) {
  for (int64_t half = 0; half < 2; half++, row += 16) {
    const bf16* source = static_cast<const bf16*>(matrix.data) + row * linear.in_features;
    const int64_t num_rows = larger<int64_t>(0, smaller<int64_t>(16, matrix.rows - row));
    if (num_rows == 16 && linear.in_features % 32 == 0)
      pack_half_panel<true>(linear, source, num_rows, first, count, panel + half * 32);
    else
      pack_half_panel<false>(linear, source, num_rows, first, count, panel + half * 32);
  }
}

struct Block {
  const bf16* x;         // of the first token tile and step
  const bf16* weight[2]; // of the first step
  int64_t x_stride;      // elements from one token tile to the next
  int64_t steps;
};

// sums[32 tokens, 32 rows] in tiles 0 to 3, one or two tiles of tokens; aside() after each step.
template <int token_tiles, class Aside>
inline void multiply(const Block& block, const float* before, float* sums, const Aside& aside) {
  constexpr int64_t stride = kBlock * sizeof(float);
  if (before) {
    _tile_loadd(0, before, stride);
    _tile_loadd(1, before + 16, stride);
    if constexpr (token_tiles > 1) _tile_loadd(2, before + 16 * kBlock, stride);
    if constexpr (token_tiles > 1) _tile_loadd(3, before + 16 * kBlock + 16, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < block.steps; step++) {
    const bf16* x = block.x + step * kTileElements;
    _tile_loadd(4, x, 64);
    _tile_loadd(6, block.weight[0] + step * kStepElements, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, block.weight[1] + step * kStepElements, 128);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (token_tiles > 1) {
      _tile_loadd(5, x + block.x_stride, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    aside();
  }
  _tile_stored(0, sums, stride);
  _tile_stored(1, sums + 16, stride);
  if constexpr (token_tiles > 1) _tile_stored(2, sums + 16 * kBlock, stride);
  if constexpr (token_tiles > 1) _tile_stored(3, sums + 16 * kBlock + 16, stride);
  finish_stores(sums);
}

// Rows that are computed together. A block has both halves of a panel; of silu_mul, the same half of gate's and of up's.
template <Finish finish>
struct Group {
  static constexpr bool paired = finish == Finish::silu_mul;
  const Linear& linear;
  int64_t first_row; // of out
  int64_t num_rows;

  static constexpr int64_t most_rows = kGroupPanels * kPanelRows / (paired ? 2 : 1);
  static constexpr int64_t block_rows = paired ? 16 : 32;
  int64_t num_blocks() const { return (num_rows + block_rows - 1) / block_rows; }

  // Weights of a chunk of depth; those that are row-major are copied to `packed` first.
  struct Weights {
    const bf16* lower;
    const bf16* upper;
    int64_t panel_elements; // from one panel to the next
  };
  Weights weights(int64_t first_step, int64_t steps, bf16* packed) const {
    if (shuteye::form_of(linear.weight.kind) == shuteye::kPanelsForm) {
      const int64_t all = round_up(linear.in_features, 32) * kPanelRows;
      const int64_t offset = first_row / kPanelRows * all + first_step * kStepElements;
      const auto* upper = static_cast<const bf16*>(paired ? linear.upper.data : linear.weight.data);
      return {static_cast<const bf16*>(linear.weight.data) + offset, upper + offset, all};
    }
    const int64_t panel = steps * kStepElements, num_panels = (num_rows + kPanelRows - 1) / kPanelRows;
    bf16* upper = packed + (paired ? num_panels * panel : 0);
    for (int64_t index = 0; index < num_panels; index++) {
      const int64_t row = first_row + index * kPanelRows;
      pack_panel(linear, linear.weight, row, first_step, steps, packed + index * panel);
      if (paired) pack_panel(linear, linear.upper, row, first_step, steps, upper + index * panel);
    }
    finish_stores(packed);
    return {packed, upper, panel};
  }
};

// What is left to finish of a block of sums.
template <Finish finish>
class Unfinished {
 public:
  Unfinished() = default;
  Unfinished(const Group<finish>& group, int64_t block, const float* sums, TokenRange tokens)
      : sums_(sums),
        tokens_(tokens),
        row_(group.first_row + block * group.block_rows),
        num_rows_(smaller(group.block_rows, group.num_rows - block * group.block_rows)) {}

  void some(const Linear& linear, int64_t num_tokens) {
    if (tokens_.count == 0) return;
    const TokenRange now{tokens_.first, smaller(num_tokens, tokens_.count)};
    finish_as<bf16, finish>(linear, {sums_, kBlock}, {sums_ + 16, kBlock}, row_, num_rows_, now);
    sums_ += now.count * kBlock;
    tokens_ = {now.first + now.count, tokens_.count - now.count};
  }
  void all(const Linear& linear) { some(linear, tokens_.count); }

 private:
  const float* sums_ = nullptr; // of the first token that is left
  TokenRange tokens_{0, 0};
  int64_t row_ = 0; // of out
  int64_t num_rows_ = 0;
};

template <Finish finish>
inline void compute_group(const Group<finish>& group, const bf16* packed, const GroupScratch& scratch) {
  const Linear& linear = group.linear;
  const Depth depth(linear);
  const int64_t token_tiles = tiles_of_sixteen(linear);
  alignas(64) float own[2][kBlockSums]; // the block that is multiplied and the one that is finished, in turn
  int64_t turn = 0;
  Unfinished<finish> unfinished;
  for (int64_t first = 0; first < depth.steps; first += depth.chunk_steps) {
    const int64_t steps = smaller(depth.chunk_steps, depth.steps - first);
    const bool is_last = first + steps == depth.steps;
    const int64_t tokens_per_step = (kBlock + steps - 1) / steps;
    const auto aside = [&] { unfinished.some(linear, tokens_per_step); };
    const auto weights = group.weights(first, steps, scratch.weight);
    float* kept = scratch.sums;
    for (int64_t tile = 0; tile < token_tiles; tile += 2) {
      for (int64_t index = 0; index < group.num_blocks(); index++, kept += kBlockSums) {
        const int64_t panel = group.paired ? index / 2 * weights.panel_elements + index % 2 * 32 : index * weights.panel_elements;
        const Block block{packed + (tile * depth.steps + first) * kTileElements,
                          {weights.lower + panel, group.paired ? weights.upper + panel : weights.lower + panel + 32},
                          depth.steps * kTileElements,
                          steps};
        const float* before = first ? kept : nullptr;
        float* sums = is_last ? own[turn] : kept;
        tile + 1 < token_tiles ? multiply<2>(block, before, sums, aside) : multiply<1>(block, before, sums, aside);
        if (!is_last) continue;
        unfinished = Unfinished<finish>(group, index, sums, {tile * 16, smaller(kBlock, linear.num_tokens - tile * 16)});
        turn = 1 - turn;
      }
    }
  }
  unfinished.all(linear);
}

inline void tile_rows(const Linear& linear, const void* prepared, void* memory, int64_t first_row, int64_t end_row) {
  with_finish(linear.finish, [&](auto tag) {
    using Rows = Group<decltype(tag)::finish>;
    for (int64_t row = first_row; row < end_row; row += Rows::most_rows) {
      const Rows group{linear, row, smaller(Rows::most_rows, end_row - row)};
      compute_group(group, static_cast<const bf16*>(prepared), GroupScratch(memory));
    }
  });
}

} // namespace SHUTEYE_ISA
