// Dot products of weight rows with prepared tokens, held in registers. Knows nothing of tiles or rounding.
#pragma once
#include "lanes.h"

namespace SHUTEYE_ISA {

struct DotShape {
  int64_t in_features; // elements of a weight row, and from one row to the next
  int64_t depth;       // elements from one prepared token to the next
};

// Weights of type W widened to float, times float tokens.
template <class W>
struct FloatDot {
  using Weight = W;
  using X = float;
  using Vector = Lanes;
  static constexpr int step = Lanes::width;
  static Vector read(const W* source) { return load(source); }
  static Vector read(const W* source, int64_t count) { return load_partial(source, count); }
  static Vector read_x(const float* source) { return load(source); }
  static Lanes multiply_add(Vector weight, Vector x, Lanes sum) { return fma(weight, x, sum); }
};

#if defined(SHUTEYE_LANES_AVX512)
// Pairs of bfloat16 at a time: twice the elements per instruction, and nothing is widened.
struct PairDot {
  using Weight = bf16;
  using X = bf16;
  using Vector = __m512bh;
  static constexpr int step = 32;
  static Vector read(const bf16* source) { return (__m512bh)_mm512_loadu_si512(source); }
  static Vector read(const bf16* source, int64_t count) {
    const __mmask32 mask = (1u << count) - 1u;
    return (__m512bh)_mm512_maskz_loadu_epi16(mask, source);
  }
  static Vector read_x(const bf16* source) { return read(source); }
  static Lanes multiply_add(Vector weight, Vector x, Lanes sum) { return {_mm512_dpbf16_ps(sum.v, weight, x)}; }
};

inline void sum_four(const Lanes* lanes, float* sums) {
  const __m512 left = _mm512_add_ps(_mm512_unpacklo_ps(lanes[0].v, lanes[1].v), _mm512_unpackhi_ps(lanes[0].v, lanes[1].v));
  const __m512 right = _mm512_add_ps(_mm512_unpacklo_ps(lanes[2].v, lanes[3].v), _mm512_unpackhi_ps(lanes[2].v, lanes[3].v));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(left), _mm512_castps_pd(right));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(left), _mm512_castps_pd(right));
  const __m512 quarters = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high)); // each 128 bits: four part sums
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}
#else
inline void sum_four(const Lanes* lanes, float* sums) {
  for (int index = 0; index < 4; index++) sums[index] = sum(lanes[index]);
}
#endif

#ifndef SHUTEYE_PREFETCH_BYTES
#define SHUTEYE_PREFETCH_BYTES 4096
#endif

// sums[token * 16 + row] for 4 rows and `num_tokens` tokens.
template <class Dot, int num_rows, int num_tokens>
inline void dot_block(const DotShape& shape, const typename Dot::Weight* weight, const typename Dot::X* x, float* sums) {
  static_assert(num_rows == 4, "sum_four sums four rows");
  Lanes totals[num_tokens][num_rows];
  for (auto& row : totals)
    for (Lanes& total : row) total = broadcast(0.0f);
  int64_t index = 0;
  const auto accumulate = [&](const typename Dot::Vector* rows) {
    for (int token = 0; token < num_tokens; token++) {
      const typename Dot::Vector tokens = Dot::read_x(x + token * shape.depth + index);
      for (int row = 0; row < num_rows; row++) {
        totals[token][row] = Dot::multiply_add(rows[row], tokens, totals[token][row]);
      }
    }
  };
  typename Dot::Vector rows[num_rows];
  for (; index + Dot::step <= shape.in_features; index += Dot::step) {
    for (int row = 0; row < num_rows; row++) {
      const auto* source = weight + row * shape.in_features + index;
      __builtin_prefetch(reinterpret_cast<const char*>(source) + SHUTEYE_PREFETCH_BYTES);
      rows[row] = Dot::read(source);
    }
    accumulate(rows);
  }
  if (index < shape.in_features) {
    for (int row = 0; row < num_rows; row++) {
      rows[row] = Dot::read(weight + row * shape.in_features + index, shape.in_features - index);
    }
    accumulate(rows);
  }
  for (int token = 0; token < num_tokens; token++) sum_four(totals[token], sums + token * 16);
}

template <class Dot>
inline float dot_one(const DotShape& shape, const typename Dot::Weight* weight, const typename Dot::X* x) {
  Lanes total = broadcast(0.0f);
  int64_t index = 0;
  for (; index + Dot::step <= shape.in_features; index += Dot::step) {
    total = Dot::multiply_add(Dot::read(weight + index), Dot::read_x(x + index), total);
  }
  if (index < shape.in_features) {
    const auto rest = Dot::read(weight + index, shape.in_features - index);
    total = Dot::multiply_add(rest, Dot::read_x(x + index), total);
  }
  return sum(total);
}

} // namespace SHUTEYE_ISA
