// Attention of many query rows with AMX: scores = query keys^T and sums += weights values, 16 x 16 at a time.
// Weights are rounded to bfloat16 before they meet the values, as torch's flash attention does.
// Knows nothing of threads; tasks of few rows are left to attention.h.
#pragma once
#include "attention.h"
#include "tiles.h"

namespace SHUTEYE_ISA {

constexpr int64_t kMinTileRows = 13; // measured: with fewer, tiles are too empty to gain
constexpr float kNothingSeen = -1e30f; // below any score
constexpr float kLog2e = 1.44269504f;

// Rows are padded to multiples of 16; what is there is never read as a result.
struct TileScratch {
  bf16* query;   // [rows, depth]
  bf16* weights; // [rows, kKeySpan]
  bf16* keys;    // [kKeySpan / 16][depth / 32] tiles of [16 pairs of dimensions][16 keys]
  bf16* values;  // [kKeySpan / 32][depth / 16] tiles of [16 pairs of keys][16 dimensions]
  float* sums;   // [rows, depth]
  float* scores; // [rows, kKeySpan]
  float* maxima; // of scores times scale times log2(e)
  float* totals; // [rows, 16], to be summed at last
  int64_t rows;
  int64_t depth;

  TileScratch(void* memory, const AttentionShape& shape) : rows(shuteye::round_up(shape.rows, 16)), depth(shape.padded_dim) {
    sums = static_cast<float*>(memory);
    scores = sums + rows * depth;
    maxima = scores + rows * kKeySpan;
    totals = maxima + rows;
    query = reinterpret_cast<bf16*>(totals + rows * 16);
    weights = query + rows * depth;
    keys = weights + rows * kKeySpan;
    values = keys + kKeySpan * depth;
  }
};

inline __m512i load_row(const bf16* row, int64_t count) { // up to 32 elements
  if (count >= 32) return _mm512_loadu_si512(row);
  return _mm512_maskz_loadu_epi16(count > 0 ? (1u << count) - 1u : 0u, row);
}

inline __m512i widen_row(const bf16* row, int64_t count) { // up to 16 elements, each in the low half of a lane
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes_between(0, count), row));
}

inline void pack_keys(const Span<bf16>& span, const Span<bf16>& next, int64_t num_keys, const AttentionShape& shape, const TileScratch& scratch) {
  bf16* tile = scratch.keys;
  const int64_t num_next = next.positions.end - next.positions.begin;
  for (int64_t first = 0; first < num_keys; first += 16) {
    for (int64_t key = first; key < smaller(first + 16, num_next); key++) prefetch_row(next.keys[key], shape.head_dim);
    for (int64_t index = 0; index < scratch.depth; index += 32, tile += kTileElements) {
      __m512i rows[16];
      for (int64_t key = 0; key < 16; key++) {
        rows[key] = first + key < num_keys ? load_row(span.keys[first + key] + index, shape.head_dim - index)
                                           : _mm512_setzero_si512();
      }
      transpose(rows);
      for (int64_t pair = 0; pair < 16; pair++) _mm512_storeu_si512(tile + pair * 32, rows[pair]);
    }
  }
}

inline void pack_values(const Span<bf16>& span, const Span<bf16>& next, int64_t num_keys, const AttentionShape& shape, const TileScratch& scratch) {
  const int64_t num_next = next.positions.end - next.positions.begin;
  for (int64_t key = 0; key < shuteye::round_up(num_keys, 32); key += 2) {
    for (int64_t each = key; each < smaller(key + 2, num_next); each++) prefetch_row(next.values[each], shape.head_dim);
    bf16* target = scratch.values + key / 32 * scratch.depth * 32 + key / 2 % 16 * 32;
    for (int64_t index = 0; index < scratch.depth; index += 16, target += kTileElements) {
      const int64_t count = shape.head_dim - index;
      const __m512i even = key < num_keys ? widen_row(span.values[key] + index, count) : _mm512_setzero_si512();
      const __m512i odd = key + 1 < num_keys ? widen_row(span.values[key + 1] + index, count) : _mm512_setzero_si512();
      _mm512_storeu_si512(target, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
  }
}

// scores of 16 rows with up to 64 keys, in tiles 0 to 3.
inline void score_tiles(const TileScratch& scratch, int64_t row, int64_t num_keys) {
  const int64_t stride = scratch.depth * 16; // elements from 16 keys to the next 16
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t index = 0; index < scratch.depth; index += 32) {
    const bf16* keys = scratch.keys + index * 16;
    _tile_loadd(4, scratch.query + row * scratch.depth + index, scratch.depth * 2);
    _tile_loadd(5, keys, 64);
    _tile_dpbf16ps(0, 4, 5);
    if (num_keys > 16) { _tile_loadd(6, keys + stride, 64); _tile_dpbf16ps(1, 4, 6); }
    if (num_keys > 32) { _tile_loadd(5, keys + 2 * stride, 64); _tile_dpbf16ps(2, 4, 5); }
    if (num_keys > 48) { _tile_loadd(6, keys + 3 * stride, 64); _tile_dpbf16ps(3, 4, 6); }
  }
  float* scores = scratch.scores + row * kKeySpan;
  _tile_stored(0, scores, kKeySpan * 4);
  _tile_stored(1, scores + 16, kKeySpan * 4);
  _tile_stored(2, scores + 32, kKeySpan * 4);
  _tile_stored(3, scores + 48, kKeySpan * 4);
}

// One row's scores to weights; `seen` is relative to the span. What the row does not see weighs nothing.
inline void weigh_tile_row(const TileScratch& scratch, int64_t row, Range seen, Lanes scale) {
  const float* scores = scratch.scores + row * kKeySpan;
  bf16* weights = scratch.weights + row * kKeySpan;
  if (seen.begin >= seen.end) {
    memset(weights, 0, kKeySpan * sizeof(bf16));
    return;
  }
  __mmask16 masks[4];
  Lanes parts[4], highest = broadcast(kNothingSeen);
  for (int part = 0; part < 4; part++) {
    masks[part] = lanes_between(seen.begin - part * 16, seen.end - part * 16);
    parts[part] = load(scores + part * 16) * scale;
    highest.v = _mm512_mask_max_ps(highest.v, masks[part], highest.v, parts[part].v);
  }
  const float before = scratch.maxima[row], maximum = larger(before, largest(highest));
  Lanes total = load(scratch.totals + row * 16);
  if (maximum > before) {
    const Lanes factor = rough_exp2(broadcast(before - maximum));
    total = total * factor;
    float* sums = scratch.sums + row * scratch.depth;
    for (int64_t index = 0; index < scratch.depth; index += 16) store(sums + index, load(sums + index) * factor);
    scratch.maxima[row] = maximum;
  }
  for (int part = 0; part < 4; part++) {
    parts[part].v = _mm512_maskz_mov_ps(masks[part], rough_exp2(parts[part] - broadcast(maximum)).v);
    total = total + parts[part];
  }
  for (int half = 0; half < 2; half++)
    _mm512_storeu_si512(weights + half * 32, (__m512i)_mm512_cvtne2ps_pbh(parts[half * 2 + 1].v, parts[half * 2].v));
  store(scratch.totals + row * 16, total);
}

// sums of 16 rows and 32 dimensions, in tiles 0 and 1.
inline void sum_tiles(const TileScratch& scratch, int64_t row, int64_t index, int64_t num_keys) {
  float* sums = scratch.sums + row * scratch.depth + index;
  _tile_loadd(0, sums, scratch.depth * 4);
  _tile_loadd(1, sums + 16, scratch.depth * 4);
  for (int64_t key = 0; key < num_keys; key += 32) {
    const bf16* values = scratch.values + key * scratch.depth + index * 32;
    _tile_loadd(4, scratch.weights + row * kKeySpan + key, kKeySpan * 2);
    _tile_loadd(5, values, 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, values + kTileElements, 64);
    _tile_dpbf16ps(1, 4, 6);
  }
  _tile_stored(0, sums, scratch.depth * 4);
  _tile_stored(1, sums + 16, scratch.depth * 4);
}

inline void weigh_rows(const ShuteyeAttention& attention, const AttentionTask& task, const AttentionShape& shape,
                       const TileScratch& scratch, Range positions) {
  const Lanes scale = broadcast(static_cast<float>(attention.scale) * kLog2e);
  for (int64_t row = 0; row < shape.rows; row++) {
    const Range seen = seen_by(attention, task, row / shape.group);
    const Range own{larger(seen.begin, positions.begin) - positions.begin, smaller(seen.end, positions.end) - positions.begin};
    weigh_tile_row(scratch, row, own, scale);
  }
  finish_stores(scratch.weights);
}

inline void attend_tile_span(const ShuteyeAttention& attention, const AttentionTask& task, const AttentionShape& shape,
                             const TileScratch& scratch, const Span<bf16>& span, const Span<bf16>& next) {
  const int64_t num_keys = span.positions.end - span.positions.begin;
  pack_keys(span, next, num_keys, shape, scratch);
  pack_values(span, next, num_keys, shape, scratch);
  finish_stores(scratch.keys);
  for (int64_t row = 0; row < scratch.rows; row += 16) score_tiles(scratch, row, num_keys);
  finish_stores(scratch.scores);
  weigh_rows(attention, task, shape, scratch, span.positions);
  for (int64_t row = 0; row < scratch.rows; row += 16)
    for (int64_t index = 0; index < scratch.depth; index += 32) sum_tiles(scratch, row, index, num_keys);
  finish_stores(scratch.sums);
}

inline void attend_any(const ShuteyeAttention& attention, const AttentionTask& task, void* memory) {
  const AttentionShape shape(attention, task);
  if (shape.rows < kMinTileRows) return attend<PairDot>(attention, task, memory);
  const TileScratch scratch(memory, shape);
  memset(scratch.query, 0, scratch.rows * scratch.depth * sizeof(bf16));
  memset(scratch.weights, 0, scratch.rows * kKeySpan * sizeof(bf16));
  memset(scratch.sums, 0, scratch.rows * scratch.depth * sizeof(float));
  memset(scratch.totals, 0, scratch.rows * 16 * sizeof(float));
  for (int64_t row = 0; row < scratch.rows; row++) scratch.maxima[row] = kNothingSeen;
  read_queries<PairDot>(attention, task, shape, scratch.query);
  const int64_t begin = seen_by(attention, task, 0).begin;
  const int64_t end = seen_by(attention, task, task.num_tokens - 1).end;
  const auto span_from = [&](int64_t first) { return Range{first, smaller(first + kKeySpan, end)}; };
  Span<bf16> next(attention, task, span_from(begin));
  for (int64_t first = begin; first < end; first += kKeySpan) {
    const Span<bf16> span = next;
    if (first + kKeySpan < end) next = Span<bf16>(attention, task, span_from(first + kKeySpan));
    attend_tile_span(attention, task, shape, scratch, span, next);
  }
  for (int64_t row = 0; row < shape.rows; row++) { // as finish_rows and merge want them
    scratch.maxima[row] /= kLog2e;
    scratch.totals[row] = sum(load(scratch.totals + row * 16));
  }
  finish_rows<bf16>(attention, shape, task, scratch.sums, scratch.maxima, scratch.totals);
}

} // namespace SHUTEYE_ISA
