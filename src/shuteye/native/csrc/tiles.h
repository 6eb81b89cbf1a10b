// AMX tiles: their configuration, and 16 x 16 transposition. Knows nothing of products or attention.
#pragma once
#include "lanes.h"

namespace SHUTEYE_ISA {

constexpr int64_t kTileElements = 512; // of bfloat16: 16 rows of 32, or 16 pairs of rows of 16

// GCC does not know what a tile instruction reads: without this it may move or drop the stores to it.
inline void finish_stores(const void* memory) { asm volatile("" ::"r"(memory) : "memory"); }

struct TileConfig {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

inline void configure_tiles() {
  TileConfig config{};
  config.palette = 1;
  for (int tile = 0; tile < 8; tile++) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = 16;
  }
  finish_stores(&config);
  _tile_loadconfig(&config);
}

inline void release_tiles() { _tile_release(); }

// In place: rows[i] lane j becomes rows[j] lane i.
inline void transpose(__m512i (&rows)[16]) {
  __m512i other[16];
  for (int i = 0; i < 16; i += 2) {
    other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) { // 128-bit quarters now hold columns of 4 rows
    rows[i] = _mm512_unpacklo_epi64(other[i], other[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(other[i], other[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(other[i + 1], other[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(other[i + 1], other[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    other[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    other[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    other[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    other[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    rows[i] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0xdd);
  }
}

// Bits [begin, end) of 16; empty where end <= begin.
inline __mmask16 lanes_between(int64_t begin, int64_t end) {
  const int64_t low = larger<int64_t>(0, smaller<int64_t>(begin, 16)), high = larger<int64_t>(0, smaller<int64_t>(end, 16));
  return low < high ? static_cast<__mmask16>(((1u << high) - 1u) & ~((1u << low) - 1u)) : static_cast<__mmask16>(0);
}

} // namespace SHUTEYE_ISA
