// Attention of many query rows with AMX, 16 rows at a time: scores = keys query^T and sums^T += values^T weights, so that
// a column is a row of queries everywhere (attention_columns.h). Knows nothing of threads; tasks of few rows are left to
// attention.h.
#pragma once
#include "attention_columns.h"
#include "tiles.h"

namespace SHUTEYE_ISA {

constexpr int64_t kMinTileRows = 13; // measured: with fewer, tiles are too empty to gain
constexpr int64_t kKeysAside = 4;    // weighed between two products of tiles: measured

// 16 rows of queries, the width of a tile; the last of a task may be padded with rows that are never read as a result.
struct Strip {
  Columns columns;
  __m512i begins; // of the key positions that each row sees
  __m512i ends;
  int64_t end; // of them all
  bool begun;  // false: none was seen yet
};

struct TileScratch {
  float* sums;       // [strips][depth][16 rows]
  float* scores;     // [2 strips][kKeySpan][16 rows]
  float* rows;       // [16 rows][depth]
  uint32_t* weights; // [2 strips][kKeySpan / 2][16 rows] of pairs of keys
  bf16* query;       // [strips][depth / 32] tiles of [16 pairs of dimensions][16 rows]
  bf16* keys;        // [kKeySpan][depth]
  bf16* values;      // [depth / 16][kKeySpan / 32] tiles of [16 dimensions][32 keys]
  Strip* strips;
  bf16* expanded; // [2, kKeySpan, head_dim], a span of a cache of others
  int64_t num_strips;
  int64_t depth;

  TileScratch(void* memory, const AttentionShape& shape)
      : num_strips((shape.rows + kColumns - 1) / kColumns), depth(shape.padded_dim) {
    const int64_t strip_elements = depth * kColumns;
    sums = static_cast<float*>(memory);
    scores = sums + num_strips * strip_elements;
    rows = scores + 2 * kColumns * kKeySpan;
    weights = reinterpret_cast<uint32_t*>(rows + strip_elements);
    query = reinterpret_cast<bf16*>(weights + kColumns * kKeySpan);
    keys = query + num_strips * strip_elements;
    values = keys + kKeySpan * depth;
    strips = reinterpret_cast<Strip*>(values + kKeySpan * depth);
    expanded = reinterpret_cast<bf16*>(strips + num_strips);
  }
  float* sums_of(int64_t strip) const { return sums + strip * depth * kColumns; }
  bf16* query_of(int64_t strip) const { return query + strip * depth * kColumns; }
  float* scores_of(int64_t strip) const { return scores + strip % 2 * kColumns * kKeySpan; }
  uint32_t* weights_of(int64_t strip) const { return weights + strip % 2 * kColumns * kKeySpan / 2; }
};

inline __m512i load_row(const bf16* row, int64_t count) { // up to 32 elements
  if (count >= 32) return _mm512_loadu_si512(row);
  return _mm512_maskz_loadu_epi16(count > 0 ? (1u << count) - 1u : 0u, row);
}

inline void copy_keys(const Span<bf16>& span, int64_t head_dim, const TileScratch& scratch) {
  bf16* target = scratch.keys;
  for (int64_t key = 0; key < span.size(); key++) {
    for (int64_t index = 0; index < scratch.depth; index += 32, target += 32)
      _mm512_storeu_si512(target, load_row(span.keys[key] + index, head_dim - index));
  }
}

// Keys of the last 32 that are not there become zeros: what they weigh is zero, but zero times NaN is not.
inline void transpose_values(const Span<bf16>& span, int64_t head_dim, const TileScratch& scratch) {
  constexpr int64_t step = kKeySpan / 32 * kTileElements; // from 16 dimensions to the next
  for (int64_t first = 0; first < span.size(); first += 32) {
    bf16* tiles = scratch.values + first / 32 * kTileElements;
    for (int64_t index = 0; index < scratch.depth; index += 32, tiles += 2 * step) {
      const auto value = [&](int64_t key) {
        return key < span.size() ? load_row(span.values[key] + index, head_dim - index) : _mm512_setzero_si512();
      };
      __m512i lower[16], upper[16]; // the lower and the upper fours of each eight dimensions
      for (int64_t pair = 0; pair < 16; pair++) {
        const __m512i even = value(first + 2 * pair), odd = value(first + 2 * pair + 1);
        lower[pair] = _mm512_unpacklo_epi16(even, odd);
        upper[pair] = _mm512_unpackhi_epi16(even, odd);
      }
      transpose(lower);
      transpose(upper);
      for (int64_t each = 0; each < 16; each++) {
        const int64_t dimension = each / 4 * 8 + each % 4;
        bf16* row = tiles + dimension / 16 * step + dimension % 16 * 32;
        _mm512_storeu_si512(row, lower[each]);
        _mm512_storeu_si512(row + 4 * 32, upper[each]);
      }
    }
  }
}

// Tiles 0 to 3, or the first `count` of them, one after the other in memory.
inline void load_four(const float* tiles, int64_t count) {
  _tile_loadd(0, tiles, 64);
  if (count > 1) _tile_loadd(1, tiles + 256, 64);
  if (count > 2) _tile_loadd(2, tiles + 512, 64);
  if (count > 3) _tile_loadd(3, tiles + 768, 64);
}

inline void store_four(float* tiles, int64_t count) {
  _tile_stored(0, tiles, 64);
  if (count > 1) _tile_stored(1, tiles + 256, 64);
  if (count > 2) _tile_stored(2, tiles + 512, 64);
  if (count > 3) _tile_stored(3, tiles + 768, 64);
}

// The same tiles += left[i] right; the tiles of left are `step` elements apart. aside() after each product: while one is
// under way, half of the vector unit is free.
template <class Aside>
SHUTEYE_INLINE void add_products(const bf16* left, int64_t step, int64_t stride_bytes, const void* right, int64_t count,
                                 const Aside& aside) {
  _tile_loadd(5, right, 64);
  _tile_loadd(4, left, stride_bytes);
  _tile_dpbf16ps(0, 4, 5);
  aside();
  if (count > 1) {
    _tile_loadd(6, left + step, stride_bytes);
    _tile_dpbf16ps(1, 6, 5);
    aside();
  }
  if (count > 2) {
    _tile_loadd(7, left + 2 * step, stride_bytes);
    _tile_dpbf16ps(2, 7, 5);
    aside();
  }
  if (count > 3) {
    _tile_loadd(4, left + 3 * step, stride_bytes);
    _tile_dpbf16ps(3, 4, 5);
    aside();
  }
}

// Scores of a strip with the first `num_keys` keys, rounded up to 16.
template <class Aside>
SHUTEYE_INLINE void score_strip(const TileScratch& scratch, int64_t strip, int64_t num_keys, const Aside& aside) {
  static_assert(kKeySpan == 64, "four tiles of scores");
  const bf16* query = scratch.query_of(strip);
  const int64_t count = (num_keys + 15) / 16;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t index = 0; index < scratch.depth; index += 32)
    add_products(scratch.keys + index, 16 * scratch.depth, scratch.depth * 2, query + index * kColumns, count, aside);
  store_four(scratch.scores_of(strip), count);
  finish_stores(scratch.scores);
}

// sums += values weights for a strip and the first `num_keys` keys, rounded up to 32.
template <class Aside>
SHUTEYE_INLINE void sum_strip(const TileScratch& scratch, int64_t strip, int64_t num_keys, const Aside& aside) {
  const uint32_t* weights = scratch.weights_of(strip);
  constexpr int64_t step = kKeySpan / 32 * kTileElements; // from 16 dimensions to the next
  for (int64_t index = 0; index < scratch.depth; index += 64) {
    const int64_t count = smaller<int64_t>(4, (scratch.depth - index) / 16);
    float* sums = scratch.sums_of(strip) + index * kColumns;
    load_four(sums, count);
    for (int64_t key = 0; key < num_keys; key += 32) {
      const bf16* values = scratch.values + index / 16 * step + key / 32 * kTileElements;
      add_products(values, step, 64, weights + key / 2 * kColumns, count, aside);
    }
    store_four(sums, count);
  }
  finish_stores(scratch.sums);
}

// A strip meets a span of keys.
struct Meeting {
  const TileScratch& scratch;
  int64_t strip;
  int64_t first_key; // position of the span's first
  int64_t num_keys;  // up to the last that any row sees, rounded up to 32

  // The rows that see a key of the span.
  __mmask16 seeing(int64_t key) const {
    const __m512i position = _mm512_set1_epi32(static_cast<int32_t>(first_key + key));
    const Strip& own = scratch.strips[strip];
    return _mm512_mask_cmpgt_epi32_mask(_mm512_cmple_epi32_mask(own.begins, position), own.ends, position);
  }
};

// Raises the references of a strip as far as the scores of a span need it.
template <bool sees_all>
void make_room(const Meeting& meeting, float scale) {
  const float* scores = meeting.scratch.scores_of(meeting.strip);
  Lanes highest[4];
  for (Lanes& each : highest) each = broadcast(kNoScore);
  for (int64_t key = 0; key < meeting.num_keys; key += 4) {
    for (int64_t each = 0; each < 4; each++) {
      const Lanes own = load(scores + (key + each) * kColumns);
      if constexpr (sees_all) highest[each] = max(highest[each], own);
      else highest[each].v = _mm512_mask_max_ps(highest[each].v, meeting.seeing(key + each), highest[each].v, own.v);
    }
  }
  const Lanes exponents = max(max(highest[0], highest[1]), max(highest[2], highest[3])) * broadcast(scale);
  Lanes factors;
  if (!meeting.scratch.strips[meeting.strip].columns.raise(exponents, factors)) return;
  float* sums = meeting.scratch.sums_of(meeting.strip);
  for (int64_t index = 0; index < meeting.scratch.depth * kColumns; index += kColumns)
    store(sums + index, load(sums + index) * factors);
}

// The scores of a meeting on their way to weights, two keys at a time. Lives in registers.
template <bool sees_all>
class Weighing {
 public:
  SHUTEYE_INLINE Weighing(const Meeting& meeting, float scale)
      : meeting_(meeting), scores_(meeting.scratch.scores_of(meeting.strip)),
        weights_(meeting.scratch.weights_of(meeting.strip)), num_keys_(meeting.num_keys), factor_(broadcast(scale)),
        any_(_mm512_setzero_si512()) {
    const Columns& columns = meeting.scratch.strips[meeting.strip].columns;
    totals_ = columns.totals;
    lowered_ = broadcast(0.0f) - columns.references;
  }

  SHUTEYE_INLINE void some(int64_t num_keys) {
    for (int64_t each = 0; each < num_keys && key_ < num_keys_; each += 2) weigh_pair();
  }

  // False: some were too heavy, and nothing is changed but the weights.
  SHUTEYE_INLINE bool finish() {
    while (key_ < num_keys_) weigh_pair();
    finish_stores(weights_);
    if (sees_all && too_heavy(any_)) return false;
    meeting_.scratch.strips[meeting_.strip].columns.totals = totals_;
    return true;
  }

 private:
  SHUTEYE_INLINE void weigh_pair() {
    Lanes pair[2];
    for (int64_t each = 0; each < 2; each++) {
      pair[each] = rough_exp2(fma(load(scores_ + (key_ + each) * kColumns), factor_, lowered_));
      if constexpr (!sees_all) pair[each].v = _mm512_maskz_mov_ps(meeting_.seeing(key_ + each), pair[each].v);
    }
    const __m512i weights = pair_of(pair[0], pair[1]);
    totals_ = add_pair(totals_, weights);
    any_ = _mm512_or_si512(any_, weights);
    _mm512_storeu_si512(weights_ + key_ / 2 * kColumns, weights);
    key_ += 2;
  }

  const Meeting& meeting_;
  const float* const scores_;
  uint32_t* const weights_;
  const int64_t num_keys_;
  const Lanes factor_;
  Lanes lowered_;
  Lanes totals_;
  __m512i any_; // of the weights, or-ed together
  int64_t key_ = 0;
};

// One task's way through the spans of its keys, in a cache of C.
template <class C>
class TileAttention {
 public:
  TileAttention(const ShuteyeAttention& attention, const AttentionTask& task, void* memory)
      : attention_(attention), task_(task), shape_(attention, task), scratch_(memory, shape_),
        scale_(static_cast<float>(attention.scale) * kLog2e) {}

  void run() {
    begin();
    each_span<C>(attention_, task_, nullptr, [&](const Span<C>& span, const Span<C>& next) {
      if constexpr (__is_same(C, bf16)) take_in(span);
      else take_in(expanded(span, shape_.head_dim, scratch_.expanded));
      ahead_ = Ahead<Span<C>>(next, shape_.head_dim);
      attend_span(span.positions);
    });
    end();
  }

 private:
  void take_in(const Span<bf16>& span) {
    copy_keys(span, shape_.head_dim, scratch_);
    transpose_values(span, shape_.head_dim, scratch_);
    finish_stores(scratch_.keys);
  }

  void begin() {
    memset(scratch_.sums, 0, scratch_.num_strips * scratch_.depth * kColumns * sizeof(float));
    for (int64_t strip = 0; strip < scratch_.num_strips; strip++) begin_strip(strip);
  }

  void begin_strip(int64_t strip) {
    const auto* heads = static_cast<const bf16*>(attention_.query) + task_.kv_head * shape_.group * shape_.head_dim;
    const bf16* queries[kColumns];
    alignas(64) int32_t begins[kColumns], ends[kColumns];
    for (int64_t each = 0; each < kColumns; each++) {
      const int64_t row = smaller(strip * kColumns + each, shape_.rows - 1), token = row / shape_.heads;
      const Range seen = seen_by(attention_, task_, token);
      begins[each] = static_cast<int32_t>(seen.begin);
      ends[each] = static_cast<int32_t>(seen.end);
      queries[each] = heads + (task_.first_token + token) * attention_.query_stride + row % shape_.heads * shape_.head_dim;
    }
    scratch_.strips[strip] = {Columns(), _mm512_load_si512(begins), _mm512_load_si512(ends), ends[kColumns - 1], false};
    bf16* tile = scratch_.query_of(strip);
    for (int64_t index = 0; index < scratch_.depth; index += 32, tile += kTileElements) {
      __m512i rows[16];
      for (int64_t each = 0; each < kColumns; each++) rows[each] = load_row(queries[each] + index, shape_.head_dim - index);
      transpose(rows);
      for (int64_t pair = 0; pair < 16; pair++) _mm512_storeu_si512(tile + pair * 32, rows[pair]);
    }
  }

  // A strip's rows are weighed while tiles of the strips before and after are multiplied.
  struct Turn {
    int64_t strip;
    int64_t before;    // keys of the strip before
    int64_t num_keys;  // of this one
    int64_t following; // of the one after

    Turn next(int64_t keys) const { return {strip + 1, num_keys, following, keys}; }
  };

  void attend_span(Range positions) {
    const auto keys_of = [&](int64_t strip) -> int64_t { // relative to the span
      if (strip < 0 || strip >= scratch_.num_strips) return 0;
      return larger<int64_t>(0, shuteye::round_up(smaller(scratch_.strips[strip].end, positions.end) - positions.begin, 32));
    };
    const int64_t lines = 2 * kKeySpan * scratch_.depth / 32 / scratch_.num_strips + 1; // of the next span, each turn
    Turn turn{-1, 0, 0, keys_of(0)};
    for (; turn.strip <= scratch_.num_strips; turn = turn.next(keys_of(turn.strip + 2))) {
      ahead_.fetch(lines);
      if (turn.num_keys == 0) multiply(turn, [] {});
      else if (sees_all(scratch_.strips[turn.strip], positions)) take<true>(turn, positions);
      else take<false>(turn, positions);
    }
  }

  static bool sees_all(const Strip& strip, Range positions) {
    const auto lanes = [](int64_t position) { return _mm512_set1_epi32(static_cast<int32_t>(position)); };
    return positions.end - positions.begin == kKeySpan &&
           _mm512_cmple_epi32_mask(strip.begins, lanes(positions.begin)) == 0xffff &&
           _mm512_cmpge_epi32_mask(strip.ends, lanes(positions.end)) == 0xffff;
  }

  template <bool sees_all>
  void take(const Turn& turn, Range positions) const {
    const Meeting meeting{scratch_, turn.strip, positions.begin, turn.num_keys};
    Strip& strip = scratch_.strips[turn.strip];
    if (!sees_all || !strip.begun) make_room<sees_all>(meeting, scale_);
    strip.begun = true;
    Weighing<sees_all> weighing(meeting, scale_);
    multiply(turn, [&]() __attribute__((always_inline)) { weighing.some(kKeysAside); });
    if (weighing.finish()) return;
    make_room<sees_all>(meeting, scale_);
    Weighing<sees_all>(meeting, scale_).finish();
  }

  template <class Aside>
  SHUTEYE_INLINE void multiply(const Turn& turn, const Aside& aside) const {
    if (turn.following) score_strip(scratch_, turn.strip + 1, turn.following, aside);
    if (turn.before) sum_strip(scratch_, turn.strip - 1, turn.before, aside);
  }

  void end() {
    for (int64_t strip = 0; strip < scratch_.num_strips; strip++) {
      const float* sums = scratch_.sums_of(strip);
      for (int64_t index = 0; index < scratch_.depth; index += 16) {
        __m512i dims[16];
        for (int64_t each = 0; each < 16; each++) dims[each] = _mm512_loadu_si512(sums + (index + each) * kColumns);
        transpose(dims);
        for (int64_t each = 0; each < kColumns; each++)
          _mm512_storeu_si512(scratch_.rows + each * scratch_.depth + index, dims[each]);
      }
      alignas(64) float maxima[kColumns], totals[kColumns]; // the reference is as good as the maximum
      store(maxima, scratch_.strips[strip].columns.references * broadcast(1.0f / kLog2e));
      store(totals, scratch_.strips[strip].columns.totals);
      for (int64_t each = 0; each < smaller(kColumns, shape_.rows - strip * kColumns); each++)
        finish_row<bf16>(attention_, shape_, task_, strip * kColumns + each, scratch_.rows + each * scratch_.depth,
                         maxima[each], totals[each]);
    }
  }

  const ShuteyeAttention& attention_;
  const AttentionTask& task_;
  const AttentionShape shape_;
  const TileScratch scratch_;
  const float scale_; // of scores to exponents of 2
  Ahead<Span<C>> ahead_;
};

} // namespace SHUTEYE_ISA
