// As many vectors as a vector has lanes, transposed. Knows nothing of what they hold.
#pragma once
#include "lanes.h"

namespace SHUTEYE_ISA {

// In place: rows[i] lane j becomes rows[j] lane i; lanes have four bytes.
#if defined(SHUTEYE_LANES_AVX512)
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

inline void transpose(Lanes (&rows)[16]) {
  __m512i words[16];
  for (int i = 0; i < 16; i++) words[i] = _mm512_castps_si512(rows[i].v);
  transpose(words);
  for (int i = 0; i < 16; i++) rows[i].v = _mm512_castsi512_ps(words[i]);
}
#elif defined(SHUTEYE_LANES_AVX2)
inline void transpose(Lanes (&rows)[8]) {
  __m256 other[8];
  for (int i = 0; i < 8; i += 4) {
    const __m256 low = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v), high = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
    const __m256 low2 = _mm256_unpacklo_ps(rows[i + 2].v, rows[i + 3].v);
    const __m256 high2 = _mm256_unpackhi_ps(rows[i + 2].v, rows[i + 3].v);
    other[i] = _mm256_shuffle_ps(low, low2, 0x44);
    other[i + 1] = _mm256_shuffle_ps(low, low2, 0xee);
    other[i + 2] = _mm256_shuffle_ps(high, high2, 0x44);
    other[i + 3] = _mm256_shuffle_ps(high, high2, 0xee);
  }
  for (int i = 0; i < 4; i++) {
    rows[i].v = _mm256_permute2f128_ps(other[i], other[i + 4], 0x20);
    rows[i + 4].v = _mm256_permute2f128_ps(other[i], other[i + 4], 0x31);
  }
}
#else
inline void transpose(Lanes (&rows)[4]) {
  for (int i = 0; i < 4; i++) {
    for (int j = 0; j < i; j++) {
      const float own = rows[i].v[j];
      rows[i].v[j] = rows[j].v[i];
      rows[j].v[i] = own;
    }
  }
}
#endif

} // namespace SHUTEYE_ISA
