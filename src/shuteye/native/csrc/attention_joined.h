// Attention of one token's heads, those of several KV heads at once, with AMX: a row of a tile of scores is a key, its
// columns are query heads. Keys are read where they lie, each head's in turn against a tile that is zero outside its own
// columns; the cache is read in the order in which it stands in memory. Knows nothing of threads.
//
// Weights meet the values two keys at a time, as attention_columns.h makes them. That leaves the sums of 32 dimensions
// as two vectors, of the lower and the upper fours of each eight; they are put in order at last.
#pragma once
#include "attention_columns.h"
#include "tiles.h"

namespace SHUTEYE_ISA {

constexpr int64_t kRowsAtOnce = 4; // that share the reading of a value

class JoinedAttention {
 public:
  JoinedAttention(const ShuteyeAttention& attention, const AttentionTask& task, void* memory)
      : attention_(attention), task_(task), shape_(attention, task), scale_(static_cast<float>(attention.scale) * kLog2e) {
    sums_ = static_cast<float*>(memory);
    scores_ = sums_ + kColumns * shape_.head_dim;
    weights_ = reinterpret_cast<uint32_t*>(scores_ + kKeySpan * kColumns);
    query_ = reinterpret_cast<bf16*>(weights_ + kKeySpan / 2 * kColumns);
  }

  void run(const AttentionTask* following) {
    memset(sums_, 0, shape_.rows * shape_.head_dim * sizeof(float));
    pack_query();
    const Range seen = seen_by(attention_, task_, 0);
    Span<bf16> next = span_from(task_, seen.begin);
    for (int64_t begin = seen.begin; begin < seen.end; begin = next_start(begin)) {
      const Span<bf16> span = next;
      next = next_start(begin) < seen.end ? span_from(task_, next_start(begin)) : first_of(following);
      ahead_ = Ahead<Span<bf16>>(next, task_.num_kv_heads * shape_.head_dim);
      const Range own = span.positions;
      const int64_t first = begin / kKeySpan * kKeySpan;
      score(first, own);
      weigh({own.begin - first, own.end - first});
      for (int64_t head = 0; head < task_.num_kv_heads; head++) add_values(span, head);
    }
    end();
  }

 private:
  // [num_kv_heads][head_dim / 32] tiles of [16 pairs of dimensions][16 columns]
  void pack_query() {
    memset(query_, 0, task_.num_kv_heads * shape_.head_dim * kColumns * sizeof(bf16));
    const auto* source = static_cast<const bf16*>(attention_.query) + task_.first_token * attention_.query_stride +
                         task_.kv_head * shape_.group * shape_.head_dim;
    for (int64_t row = 0; row < shape_.rows; row++, source += shape_.head_dim) {
      bf16* tiles = query_ + row / shape_.group * shape_.head_dim * kColumns + row * 2;
      for (int64_t pair = 0; pair < shape_.head_dim / 2; pair++)
        memcpy(tiles + pair * 2 * kColumns, source + pair * 2, 2 * sizeof(bf16));
    }
  }

  static int64_t next_start(int64_t position) { return (position / kKeySpan + 1) * kKeySpan; }

  Span<bf16> span_from(const AttentionTask& task, int64_t begin) const {
    return Span<bf16>(attention_, task, {begin, smaller(seen_by(attention_, task, 0).end, next_start(begin))});
  }

  Span<bf16> first_of(const AttentionTask* following) const {
    const bool is_alike = following && following->num_kv_heads > 1;
    return is_alike ? span_from(*following, seen_by(attention_, *following, 0).begin) : Span<bf16>();
  }

  const bf16* key(int64_t position) const {
    const ShuteyeCache& cache = attention_.cache;
    const int64_t* table = attention_.sequences.tables + attention_.sequences.table_starts[task_.sequence];
    const int64_t slot = table[position / cache.block_size] * cache.block_size + position % cache.block_size;
    return cache_row<bf16>(cache, attention_.layer, 0, slot) + task_.kv_head * cache.head_dim;
  }

  // scores[key, column] of the 16s of keys of the span from `first` on that hold any of `own`.
  void score(int64_t first, Range own) {
    const int64_t begin = own.begin / 16 * 16, count = (own.end - begin + 15) / 16;
    const int64_t stride = attention_.cache.num_kv_heads * shape_.head_dim * 2; // bytes
    const bf16* keys[4];
    for (int64_t tile = 0; tile < 4; tile++) keys[tile] = key(begin + smaller(tile, count - 1) * 16);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t index = 0; index < task_.num_kv_heads * shape_.head_dim; index += 32) {
      _tile_loadd(5, query_ + index * kColumns, 64);
      _tile_loadd(4, keys[0] + index, stride);
      _tile_dpbf16ps(0, 4, 5);
      if (count > 1) { _tile_loadd(6, keys[1] + index, stride); _tile_dpbf16ps(1, 6, 5); }
      if (count > 2) { _tile_loadd(7, keys[2] + index, stride); _tile_dpbf16ps(2, 7, 5); }
      if (count > 3) { _tile_loadd(4, keys[3] + index, stride); _tile_dpbf16ps(3, 4, 5); }
    }
    float* scores = scores_ + (begin - first) * kColumns;
    _tile_stored(0, scores, 64);
    if (count > 1) _tile_stored(1, scores + 16 * kColumns, 64);
    if (count > 2) _tile_stored(2, scores + 32 * kColumns, 64);
    if (count > 3) _tile_stored(3, scores + 48 * kColumns, 64);
    finish_stores(scores_);
  }

  // Scores of keys `own`, relative to the span, to weights[pair of keys, column]; a missing last one weighs nothing.
  void weigh(Range own) {
    Lanes highest[2] = {broadcast(kNoScore), broadcast(kNoScore)};
    for (int64_t key = own.begin; key < own.end; key++)
      highest[key % 2] = max(highest[key % 2], load(scores_ + key * kColumns));
    make_room(max(highest[0], highest[1]) * broadcast(scale_));
    const Lanes factor = broadcast(scale_), lowered = broadcast(0.0f) - columns_.references;
    uint32_t* weights = weights_;
    for (int64_t key = own.begin; key < own.end; key += 2, weights += kColumns) {
      const Lanes even = rough_exp2(fma(load(scores_ + key * kColumns), factor, lowered));
      const Lanes odd = key + 1 < own.end ? rough_exp2(fma(load(scores_ + (key + 1) * kColumns), factor, lowered))
                                          : broadcast(0.0f);
      const __m512i pair = pair_of(even, odd);
      columns_.totals = add_pair(columns_.totals, pair);
      _mm512_storeu_si512(weights, pair);
    }
  }

  void make_room(Lanes highest) {
    Lanes factors;
    if (!columns_.raise(highest, factors)) return;
    alignas(64) float factor[kColumns];
    store(factor, factors);
    for (int64_t row = 0; row < shape_.rows; row++) {
      float* sums = sums_ + row * shape_.head_dim;
      for (int64_t index = 0; index < shape_.head_dim; index += 16)
        store(sums + index, load(sums + index) * broadcast(factor[row]));
    }
  }

  void add_values(const Span<bf16>& span, int64_t head) {
    const int64_t end = (head + 1) * shape_.group;
    for (int64_t row = head * shape_.group; row < end; row += kRowsAtOnce) {
      switch (smaller(kRowsAtOnce, end - row)) {
        case 1: add_to_rows<1>(span, head, row); break;
        case 2: add_to_rows<2>(span, head, row); break;
        case 3: add_to_rows<3>(span, head, row); break;
        default: add_to_rows<4>(span, head, row); break;
      }
    }
  }

  template <int count>
  void add_to_rows(const Span<bf16>& span, int64_t head, int64_t row) {
    int64_t index = 0;
    for (; index + 64 <= shape_.head_dim; index += 64) add_dimensions<count, 2>(span, head, row, index);
    if (index < shape_.head_dim) add_dimensions<count, 1>(span, head, row, index);
  }

  // sums[row] += weights[key, row] * values[key] for `count` rows and 32 * `halves` dimensions.
  template <int count, int halves>
  void add_dimensions(const Span<bf16>& span, int64_t head, int64_t row, int64_t index) {
    const int64_t offset = head * shape_.head_dim + index, num_keys = span.size();
    float* sums = sums_ + row * shape_.head_dim + index;
    __m512 totals[count][halves][2];
    for (int each = 0; each < count; each++)
      for (int half = 0; half < halves; half++)
        for (int part = 0; part < 2; part++)
          totals[each][half][part] = _mm512_loadu_ps(sums + each * shape_.head_dim + half * 32 + part * 16);
    const uint32_t* weights = weights_ + row;
    for (int64_t key = 0; key < num_keys; key += 2, weights += kColumns) {
      ahead_.fetch(4 * halves);
      for (int half = 0; half < halves; half++) {
        const __m512i even = _mm512_loadu_si512(span.values[key] + offset + half * 32);
        const __m512i odd = key + 1 < num_keys ? _mm512_loadu_si512(span.values[key + 1] + offset + half * 32)
                                               : _mm512_setzero_si512();
        const auto lower = (__m512bh)_mm512_unpacklo_epi16(even, odd), upper = (__m512bh)_mm512_unpackhi_epi16(even, odd);
        for (int each = 0; each < count; each++) {
          const auto weight = (__m512bh)_mm512_set1_epi32(static_cast<int>(weights[each]));
          totals[each][half][0] = _mm512_dpbf16_ps(totals[each][half][0], lower, weight);
          totals[each][half][1] = _mm512_dpbf16_ps(totals[each][half][1], upper, weight);
        }
      }
    }
    for (int each = 0; each < count; each++)
      for (int half = 0; half < halves; half++)
        for (int part = 0; part < 2; part++)
          _mm512_storeu_ps(sums + each * shape_.head_dim + half * 32 + part * 16, totals[each][half][part]);
  }

  void end() {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (int64_t index = 0; index < shape_.rows * shape_.head_dim; index += 32) {
      const __m512 lower = _mm512_loadu_ps(sums_ + index), upper = _mm512_loadu_ps(sums_ + index + 16);
      _mm512_storeu_ps(sums_ + index, _mm512_permutex2var_ps(lower, first, upper));
      _mm512_storeu_ps(sums_ + index + 16, _mm512_permutex2var_ps(lower, second, upper));
    }
    alignas(64) float maxima[kColumns], totals[kColumns]; // the reference is as good as the maximum
    store(maxima, columns_.references * broadcast(1.0f / kLog2e));
    store(totals, columns_.totals);
    for (int64_t row = 0; row < shape_.rows; row++)
      finish_row<bf16>(attention_, shape_, task_, row, sums_ + row * shape_.head_dim, maxima[row], totals[row]);
  }

  const ShuteyeAttention& attention_;
  const AttentionTask& task_;
  const AttentionShape shape_;
  const float scale_; // of scores to exponents of 2
  float* sums_;       // [rows, head_dim]
  float* scores_;     // [kKeySpan, 16 columns]
  uint32_t* weights_; // [kKeySpan / 2, 16 columns] of pairs
  bf16* query_;
  Columns columns_;
  Ahead<Span<bf16>> ahead_;
};

} // namespace SHUTEYE_ISA
