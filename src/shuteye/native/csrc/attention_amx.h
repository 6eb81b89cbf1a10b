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

// A strip is 16 rows, the height of a tile. Rows are padded to whole strips; what is there is never read as a result.
constexpr int64_t kStripRows = 16;

struct TileScratch {
  float* sums;   // [rows, depth]
  float* scores; // [2 strips][16, kKeySpan]
  float* maxima; // [rows], of scores times scale times log2(e)
  float* totals; // [rows, 16], to be summed at last
  bf16* query;   // [rows, depth]
  bf16* weights; // [2 strips][16, kKeySpan]
  bf16* keys;    // [kKeySpan / 16][depth / 32] tiles of [16 pairs of dimensions][16 keys]
  bf16* values;  // [kKeySpan / 32][depth / 16] tiles of [16 pairs of keys][16 dimensions]
  int64_t rows;
  int64_t depth;

  TileScratch(void* memory, const AttentionShape& shape)
      : rows(shuteye::round_up(shape.rows, kStripRows)), depth(shape.padded_dim) {
    sums = static_cast<float*>(memory);
    scores = sums + rows * depth;
    maxima = scores + 2 * kStripRows * kKeySpan;
    totals = maxima + rows;
    query = reinterpret_cast<bf16*>(totals + rows * 16);
    weights = query + rows * depth;
    keys = weights + 2 * kStripRows * kKeySpan;
    values = keys + kKeySpan * depth;
  }
  float* scores_of(int64_t strip) const { return scores + strip % 2 * kStripRows * kKeySpan; }
  bf16* weights_of(int64_t strip) const { return weights + strip % 2 * kStripRows * kKeySpan; }
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

// Tiles 0 to 3, or the first `count` of them, 16 floats of each row apart.
inline void load_sums(const float* sums, int64_t stride_bytes, int64_t count) {
  _tile_loadd(0, sums, stride_bytes);
  if (count > 1) _tile_loadd(1, sums + 16, stride_bytes);
  if (count > 2) _tile_loadd(2, sums + 32, stride_bytes);
  if (count > 3) _tile_loadd(3, sums + 48, stride_bytes);
}

inline void store_sums(float* sums, int64_t stride_bytes, int64_t count) {
  _tile_stored(0, sums, stride_bytes);
  if (count > 1) _tile_stored(1, sums + 16, stride_bytes);
  if (count > 2) _tile_stored(2, sums + 32, stride_bytes);
  if (count > 3) _tile_stored(3, sums + 48, stride_bytes);
}

// The same tiles += left right[i]; the tiles of right are `stride` elements apart.
inline void add_products(const bf16* left, int64_t stride_bytes, const bf16* right, int64_t stride, int64_t count) {
  _tile_loadd(4, left, stride_bytes);
  _tile_loadd(5, right, 64);
  _tile_dpbf16ps(0, 4, 5);
  if (count > 1) { _tile_loadd(6, right + stride, 64); _tile_dpbf16ps(1, 4, 6); }
  if (count > 2) { _tile_loadd(7, right + 2 * stride, 64); _tile_dpbf16ps(2, 4, 7); }
  if (count > 3) { _tile_loadd(5, right + 3 * stride, 64); _tile_dpbf16ps(3, 4, 5); }
}

// Scores of a strip with the first `num_keys` keys, rounded up to 16; aside() between the products.
template <class Aside>
inline void score_strip(const TileScratch& scratch, int64_t strip, int64_t num_keys, const Aside& aside) {
  const bf16* query = scratch.query + strip * kStripRows * scratch.depth;
  float* scores = scratch.scores_of(strip);
  for (int64_t key = 0; key < num_keys; key += 64) {
    const int64_t count = smaller<int64_t>(4, (num_keys - key + 15) / 16);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t index = 0; index < scratch.depth; index += 32) {
      const bf16* keys = scratch.keys + key * scratch.depth + index * 16;
      add_products(query + index, scratch.depth * 2, keys, 16 * scratch.depth, count);
      aside();
    }
    store_sums(scores + key, kKeySpan * 4, count);
  }
  finish_stores(scores);
}

// sums += weights values for a strip and the first `num_keys` keys, rounded up to 32; aside() between the products.
template <class Aside>
inline void sum_strip(const TileScratch& scratch, int64_t strip, int64_t num_keys, const Aside& aside) {
  const bf16* weights = scratch.weights_of(strip);
  for (int64_t index = 0; index < scratch.depth; index += 64) {
    const int64_t count = smaller<int64_t>(4, (scratch.depth - index) / 16);
    float* sums = scratch.sums + strip * kStripRows * scratch.depth + index;
    load_sums(sums, scratch.depth * 4, count);
    for (int64_t key = 0; key < num_keys; key += 32) {
      const bf16* values = scratch.values + key * scratch.depth + index * 32;
      add_products(weights + key, kKeySpan * 2, values, kTileElements, count);
      aside();
    }
    store_sums(sums, scratch.depth * 4, count);
  }
  finish_stores(scratch.sums);
}

// A row that has seen a higher score than before: what it has summed so far weighs less.
inline void raise_maximum(const TileScratch& scratch, int64_t row, float maximum) {
  if (scratch.maxima[row] == kNothingSeen) { // and nothing summed
    scratch.maxima[row] = maximum;
    return;
  }
  const Lanes factor = rough_exp2(broadcast(scratch.maxima[row] - maximum));
  float* sums = scratch.sums + row * scratch.depth;
  for (int64_t index = 0; index < scratch.depth; index += 16) store(sums + index, load(sums + index) * factor);
  store(scratch.totals + row * 16, load(scratch.totals + row * 16) * factor);
  scratch.maxima[row] = maximum;
}

// A row's scores to weights, 16 * `parts` of them; what the row does not see weighs nothing.
template <int parts, bool sees_all>
inline void weigh_parts(const TileScratch& scratch, int64_t row, const float* scores, Range seen, float scale, bf16* weights) {
  __mmask16 masks[parts];
  Lanes lanes[parts], highest = broadcast(kNothingSeen);
  for (int part = 0; part < parts; part++) {
    lanes[part] = load(scores + part * 16);
    if constexpr (sees_all) {
      highest = max(highest, lanes[part]);
    } else {
      masks[part] = lanes_between(seen.begin - part * 16, seen.end - part * 16);
      highest.v = _mm512_mask_max_ps(highest.v, masks[part], highest.v, lanes[part].v);
    }
  }
  const float maximum = largest(highest) * scale;
  if (maximum > scratch.maxima[row]) raise_maximum(scratch, row, maximum);
  const Lanes factor = broadcast(scale), lowered = broadcast(-scratch.maxima[row]);
  Lanes total = load(scratch.totals + row * 16);
  for (int part = 0; part < parts; part++) {
    lanes[part] = rough_exp2(fma(lanes[part], factor, lowered));
    if constexpr (!sees_all) lanes[part].v = _mm512_maskz_mov_ps(masks[part], lanes[part].v);
    total = total + lanes[part];
  }
  for (int part = 0; part < parts; part += 2)
    _mm512_storeu_si512(weights + part * 16, (__m512i)_mm512_cvtne2ps_pbh(lanes[part + 1].v, lanes[part].v));
  store(scratch.totals + row * 16, total);
}

// `seen` is relative to the span; `num_keys` is what the strip was scored with, rounded up to 32.
inline void weigh_row(const TileScratch& scratch, int64_t strip, int64_t each, Range seen, int64_t num_keys, float scale) {
  const int64_t row = strip * kStripRows + each;
  const float* scores = scratch.scores_of(strip) + each * kKeySpan;
  bf16* weights = scratch.weights_of(strip) + each * kKeySpan;
  constexpr int parts = kKeySpan / 16;
  if (seen.begin >= seen.end) {
    memset(weights, 0, num_keys * sizeof(bf16));
  } else if (seen.begin == 0 && seen.end == kKeySpan) {
    weigh_parts<parts, true>(scratch, row, scores, seen, scale, weights);
  } else if (num_keys <= kKeySpan / 2) {
    weigh_parts<parts / 2, false>(scratch, row, scores, seen, scale, weights);
  } else {
    weigh_parts<parts, false>(scratch, row, scores, seen, scale, weights);
  }
}

// One task's way through the spans of its keys.
class TileAttention {
 public:
  TileAttention(const ShuteyeAttention& attention, const AttentionTask& task, void* memory)
      : attention_(attention), task_(task), shape_(attention, task), scratch_(memory, shape_),
        scale_(static_cast<float>(attention.scale) * kLog2e) {}

  void run() {
    begin();
    each_span<bf16>(attention_, task_, [&](const Span<bf16>& span, const Span<bf16>& next) {
      const int64_t num_keys = span.positions.end - span.positions.begin;
      pack_keys(span, next, num_keys, shape_, scratch_);
      pack_values(span, next, num_keys, shape_, scratch_);
      finish_stores(scratch_.keys);
      attend_span(span.positions);
    });
    end_rows();
  }

 private:
  void begin() {
    memset(scratch_.query, 0, scratch_.rows * scratch_.depth * sizeof(bf16));
    memset(scratch_.sums, 0, scratch_.rows * scratch_.depth * sizeof(float));
    memset(scratch_.totals, 0, scratch_.rows * 16 * sizeof(float));
    for (int64_t row = 0; row < scratch_.rows; row++) scratch_.maxima[row] = kNothingSeen;
    for (int64_t row = 0; row < shape_.rows; row++) token_of_[row] = static_cast<int16_t>(row / shape_.heads);
    read_queries<PairDot>(attention_, task_, shape_, scratch_.query);
  }

  Range seen_by_row(int64_t row, Range positions) const {
    if (row >= shape_.rows) return {0, 0};
    const Range seen = seen_by(attention_, task_, token_of_[row]);
    return {larger(seen.begin, positions.begin) - positions.begin, smaller(seen.end, positions.end) - positions.begin};
  }

  // Tiles of the strips before and after are multiplied while the rows of a strip are weighed.
  void attend_span(Range positions) {
    const int64_t num_strips = scratch_.rows / kStripRows;
    const auto keys_of = [&](int64_t strip) { // of a strip's last row, which sees the most
      const int64_t last = smaller((strip + 1) * kStripRows, shape_.rows) - 1;
      return larger<int64_t>(0, shuteye::round_up(seen_by_row(last, positions).end, 32));
    };
    for (int64_t strip = -1; strip <= num_strips; strip++) {
      const bool weighs = strip >= 0 && strip < num_strips;
      const int64_t num_keys = weighs ? keys_of(strip) : 0;
      int64_t each = 0;
      const int64_t num_rows = num_keys ? kStripRows : 0;
      const auto weigh = [&](int64_t until) {
        for (; each < smaller(until, num_rows); each++) {
          const int64_t row = strip * kStripRows + each;
          prefetch_row(scratch_.sums + row * scratch_.depth, scratch_.depth); // they are next
          weigh_row(scratch_, strip, each, seen_by_row(row, positions), num_keys, scale_);
        }
      };
      const auto aside = [&] { weigh(each + 2); };
      if (strip + 1 < num_strips) score_strip(scratch_, strip + 1, keys_of(strip + 1), aside);
      if (strip > 0 && keys_of(strip - 1)) sum_strip(scratch_, strip - 1, keys_of(strip - 1), aside);
      weigh(kStripRows);
      finish_stores(scratch_.weights);
    }
  }

  void end_rows() {
    for (int64_t row = 0; row < shape_.rows; row++) { // as finish_rows and merge want them
      scratch_.maxima[row] /= kLog2e;
      scratch_.totals[row] = sum(load(scratch_.totals + row * 16));
    }
    finish_rows<bf16>(attention_, shape_, task_, scratch_.sums, scratch_.maxima, scratch_.totals);
  }

  const ShuteyeAttention& attention_;
  const AttentionTask& task_;
  const AttentionShape shape_;
  const TileScratch scratch_;
  const float scale_; // of scores to exponents of 2
  int16_t token_of_[shuteye::kMaxAttentionRows]; // of a row: division is slow
};

} // namespace SHUTEYE_ISA
