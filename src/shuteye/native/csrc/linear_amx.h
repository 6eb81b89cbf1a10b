// The same products with AMX: tile[row, token] = weight[16 rows, 32] x[32, 16 tokens], so that weights are read as they
// lie and only x, which is small, is repacked. Knows nothing of threads.
//
// x is packed as [depth / 32][tokens / 16][16 pairs][16 tokens] of pairs of bfloat16: each 16 * 16 * 4 bytes one tile.
#pragma once
#include "linear.h"
#include "tiles.h"

namespace SHUTEYE_ISA {

constexpr int64_t kTileTokens = 16;
// 16 tokens of 32 elements, `stride` elements apart, to one tile.
inline void pack_tile(const bf16* x, int64_t stride, int64_t num_tokens, uint32_t* packed) {
  __m512i rows[16];
  for (int64_t token = 0; token < kTileTokens; token++) {
    rows[token] = token < num_tokens ? _mm512_loadu_si512(x + token * stride) : _mm512_setzero_si512();
  }
  transpose(rows);
  for (int64_t pair = 0; pair < 16; pair++) _mm512_storeu_si512(packed + pair * kTileTokens, rows[pair]);
}

// Rows are prepared in a small buffer of 16 tokens at the end of the scratch's own x, then packed.
inline void prepare_tiles(const Linear& linear, const Scratch& scratch) {
  const int64_t blocks = round_up(linear.num_tokens, kTileTokens) / kTileTokens;
  auto* packed = static_cast<uint32_t*>(scratch.x);
  auto* rows = reinterpret_cast<bf16*>(packed) + blocks * kTileTokens * scratch.depth;
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t first = block * kTileTokens, count = smaller(kTileTokens, linear.num_tokens - first);
    for (int64_t token = 0; token < count; token++) {
      copy_row<bf16>(linear, first + token, rows + token * scratch.depth, scratch.depth);
    }
    for (int64_t index = 0; index < scratch.depth; index += 32) {
      pack_tile(rows + index, scratch.depth, count, packed + (index / 32 * blocks + block) * 256);
    }
  }
  finish_stores(packed);
}

// Up to 4 blocks of 16 tokens, in tiles 0 to 3; tile 4 holds weights, tile 5 tokens.
template <int num_blocks>
inline void accumulate_tiles(const bf16* weight, int64_t stride_bytes, const bf16* x) {
  _tile_loadd(4, weight, stride_bytes);
  _tile_loadd(5, x, 64);
  _tile_dpbf16ps(0, 4, 5);
  if constexpr (num_blocks > 1) {
    _tile_loadd(6, x + kTileElements, 64);
    _tile_dpbf16ps(1, 4, 6);
  }
  if constexpr (num_blocks > 2) {
    _tile_loadd(5, x + 2 * kTileElements, 64);
    _tile_dpbf16ps(2, 4, 5);
  }
  if constexpr (num_blocks > 3) {
    _tile_loadd(6, x + 3 * kTileElements, 64);
    _tile_dpbf16ps(3, 4, 6);
  }
}

inline void transpose_sixteen(const float* source, float* target, int64_t num_tokens) {
  __m512i rows[16];
  for (int64_t row = 0; row < 16; row++) rows[row] = _mm512_loadu_si512(source + row * kTileTokens);
  transpose(rows);
  for (int64_t token = 0; token < num_tokens; token++) _mm512_storeu_si512(target + token * kTileRows, rows[token]);
}

// tile[token, 16 rows] for `num_blocks` blocks of tokens from `first_block` on.
template <int num_blocks>
void compute_blocks(const Linear& linear, const Scratch& scratch, const bf16* weight, int64_t first_block, float* tile) {
  const int64_t all_blocks = round_up(linear.num_tokens, kTileTokens) / kTileTokens;
  const bf16* x = static_cast<const bf16*>(scratch.x) + first_block * kTileElements;
  const int64_t stride = all_blocks * kTileElements;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  int64_t index = 0;
  const char* ahead = reinterpret_cast<const char*>(weight + kTileRows * linear.in_features);
  for (; index + 32 <= linear.in_features; index += 32) {
    if (first_block == 0) { // the next 16 rows, in order
      for (int line = 0; line < 16; line++) __builtin_prefetch(ahead + index * 32 + line * 64, 0, 2);
    }
    accumulate_tiles<num_blocks>(weight + index, linear.in_features * 2, x + index / 32 * stride);
  }
  if (index < linear.in_features) {
    alignas(64) bf16 rest[kTileElements] = {};
    for (int64_t row = 0; row < kTileRows; row++) {
      memcpy(rest + row * 32, weight + row * linear.in_features + index, (linear.in_features - index) * 2);
    }
    finish_stores(rest);
    accumulate_tiles<num_blocks>(rest, 64, x + index / 32 * stride);
  }
  alignas(64) float sums[kTileRows * kTileTokens];
  const auto emit = [&](int64_t block) {
    const int64_t first = (first_block + block) * kTileTokens;
    transpose_sixteen(sums, tile + first * kTileRows, smaller(kTileTokens, linear.num_tokens - first));
  };
  _tile_stored(0, sums, 64);
  emit(0);
  if constexpr (num_blocks > 1) { _tile_stored(1, sums, 64); emit(1); }
  if constexpr (num_blocks > 2) { _tile_stored(2, sums, 64); emit(2); }
  if constexpr (num_blocks > 3) { _tile_stored(3, sums, 64); emit(3); }
}

// Rows of weight that do not fill a tile: 32 elements of them at a time are copied, with zeros below.
inline void compute_few_rows(const Linear& linear, const Scratch& scratch, const bf16* weight, int64_t num_rows,
                             float* tile) {
  const int64_t blocks = round_up(linear.num_tokens, kTileTokens) / kTileTokens;
  const bf16* x = static_cast<const bf16*>(scratch.x);
  for (int64_t block = 0; block < blocks; block++) {
    _tile_zero(0);
    for (int64_t index = 0; index < linear.in_features; index += 32) {
      alignas(64) bf16 rest[kTileElements] = {};
      const int64_t width = smaller<int64_t>(32, linear.in_features - index);
      for (int64_t row = 0; row < num_rows; row++) {
        memcpy(rest + row * 32, weight + row * linear.in_features + index, width * 2);
      }
      finish_stores(rest);
      accumulate_tiles<1>(rest, 64, x + (index / 32 * blocks + block) * kTileElements);
    }
    alignas(64) float sums[kTileRows * kTileTokens];
    _tile_stored(0, sums, 64);
    const int64_t first = block * kTileTokens;
    transpose_sixteen(sums, tile + first * kTileRows, smaller(kTileTokens, linear.num_tokens - first));
  }
}

inline void compute_with_tiles(const Linear& linear, const Scratch& scratch, int64_t first_row, int64_t num_rows,
                               float* tile) {
  const bf16* weight = static_cast<const bf16*>(linear.weight) + first_row * linear.in_features;
  const int64_t blocks = round_up(linear.num_tokens, kTileTokens) / kTileTokens;
  if (num_rows < kTileRows) return compute_few_rows(linear, scratch, weight, num_rows, tile);
  for (int64_t block = 0; block < blocks; block += 4) {
    switch (blocks - block) {
      case 1: compute_blocks<1>(linear, scratch, weight, block, tile); break;
      case 2: compute_blocks<2>(linear, scratch, weight, block, tile); break;
      case 3: compute_blocks<3>(linear, scratch, weight, block, tile); break;
      default: compute_blocks<4>(linear, scratch, weight, block, tile); break;
    }
  }
}

} // namespace SHUTEYE_ISA
