// AMX tiles and their configuration. Knows nothing of products or attention.
#pragma once
#include "transpose.h"

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

inline void load_config(const TileConfig& config) {
  finish_stores(&config);
  _tile_loadconfig(&config);
}

// All eight of 16 rows of 64 bytes.
inline void configure_tiles() {
  TileConfig config{};
  config.palette = 1;
  for (int tile = 0; tile < 8; tile++) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = 16;
  }
  load_config(config);
}

inline void release_tiles() { _tile_release(); }

// Bits [begin, end) of 16; empty where end <= begin.
inline __mmask16 lanes_between(int64_t begin, int64_t end) {
  const int64_t low = larger<int64_t>(0, smaller<int64_t>(begin, 16)), high = larger<int64_t>(0, smaller<int64_t>(end, 16));
  return low < high ? static_cast<__mmask16>(((1u << high) - 1u) & ~((1u << low) - 1u)) : static_cast<__mmask16>(0);
}

} // namespace SHUTEYE_ISA
