// Attention of one token's heads, those of several KV heads at once, with AMX: a row of a tile of scores is a key, its
// columns are query heads. Keys are read where they lie, each head's in turn against a tile that is zero outside its own
// columns; the cache is read in the order in which it stands in memory. Knows nothing of threads.
//
// Weights are rounded to bfloat16 before they meet the values, two keys at a time. That leaves the sums of 32 dimensions
// as two vectors, of the lower and the upper fours of each eight; they are put in order at last.
#pragma once
#include "attention_amx.h"

namespace SHUTEYE_ISA {

constexpr int64_t kJoinedRows = 16; // columns of a tile of scores
constexpr int64_t kRowsAtOnce = 4;  // that share the reading of a value

// The keys and values that are used next: fetched line by line, in order, which memory answers as fast as one long run.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const ShuteyeAttention& attention, const AttentionTask& task, Range range)
      : span_(attention, task, range), row_bytes_(task.num_kv_heads * attention.cache.head_dim * 2),
        num_rows_(2 * (range.end - range.begin)) {}

  void fetch(int64_t num_lines) {
    for (; num_lines > 0 && row_ < num_rows_; num_lines--) {
      const int64_t num_keys = num_rows_ / 2;
      const bf16* row = row_ < num_keys ? span_.keys[row_] : span_.values[row_ - num_keys];
      __builtin_prefetch(reinterpret_cast<const char*>(row) + byte_, 0, 2);
      byte_ += 64;
      if (byte_ < row_bytes_) continue;
      byte_ = 0;
      row_++;
    }
  }

 private:
  Span<bf16> span_;
  int64_t row_bytes_ = 0;
  int64_t num_rows_ = 0; // keys, then values
  int64_t row_ = 0;
  int64_t byte_ = 0;
};

class JoinedAttention {
 public:
  JoinedAttention(const ShuteyeAttention& attention, const AttentionTask& task, void* memory)
      : attention_(attention), task_(task), shape_(attention, task), scale_(static_cast<float>(attention.scale) * kLog2e) {
    sums_ = static_cast<float*>(memory);
    scores_ = sums_ + kJoinedRows * shape_.head_dim;
    weights_ = reinterpret_cast<uint32_t*>(scores_ + kKeySpan * kJoinedRows);
    query_ = reinterpret_cast<bf16*>(weights_ + kKeySpan / 2 * kJoinedRows);
    maxima_ = broadcast(kNothingSeen);
    totals_ = broadcast(0.0f);
  }

  void run(const AttentionTask* following) {
    memset(sums_, 0, shape_.rows * shape_.head_dim * sizeof(float));
    pack_query();
    const Range seen = seen_by(attention_, task_, 0);
    for (int64_t first = seen.begin / kKeySpan * kKeySpan; first < seen.end; first += kKeySpan) {
      const Range own{larger(seen.begin, first), smaller(seen.end, first + kKeySpan)};
      const Span<bf16> span(attention_, task_, own);
      ahead_ = next_to(first + kKeySpan, seen.end, following);
      score(first, own);
      weigh({own.begin - first, own.end - first});
      for (int64_t head = 0; head < task_.num_kv_heads; head++) add_values(span, head);
    }
    end();
  }

 private:
  // [num_kv_heads][head_dim / 32] tiles of [16 pairs of dimensions][16 columns]
  void pack_query() {
    memset(query_, 0, task_.num_kv_heads * shape_.head_dim * kJoinedRows * sizeof(bf16));
    const auto* source = static_cast<const bf16*>(attention_.query) + task_.first_token * attention_.query_stride +
                         task_.kv_head * shape_.group * shape_.head_dim;
    for (int64_t row = 0; row < shape_.rows; row++, source += shape_.head_dim) {
      bf16* tiles = query_ + row / shape_.group * shape_.head_dim * kJoinedRows + row * 2;
      for (int64_t pair = 0; pair < shape_.head_dim / 2; pair++)
        memcpy(tiles + pair * 2 * kJoinedRows, source + pair * 2, 2 * sizeof(bf16));
    }
  }

  Ahead next_to(int64_t first, int64_t end, const AttentionTask* following) const {
    if (first < end) return Ahead(attention_, task_, {first, smaller(end, first + kKeySpan)});
    if (!following || following->num_kv_heads == 1) return Ahead();
    const Range seen = seen_by(attention_, *following, 0);
    return Ahead(attention_, *following, {seen.begin, smaller(seen.end, (seen.begin / kKeySpan + 1) * kKeySpan)});
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
      _tile_loadd(5, query_ + index * kJoinedRows, 64);
      _tile_loadd(4, keys[0] + index, stride);
      _tile_dpbf16ps(0, 4, 5);
      if (count > 1) { _tile_loadd(6, keys[1] + index, stride); _tile_dpbf16ps(1, 6, 5); }
      if (count > 2) { _tile_loadd(7, keys[2] + index, stride); _tile_dpbf16ps(2, 7, 5); }
      if (count > 3) { _tile_loadd(4, keys[3] + index, stride); _tile_dpbf16ps(3, 4, 5); }
    }
    float* scores = scores_ + (begin - first) * kJoinedRows;
    _tile_stored(0, scores, 64);
    if (count > 1) _tile_stored(1, scores + 16 * kJoinedRows, 64);
    if (count > 2) _tile_stored(2, scores + 32 * kJoinedRows, 64);
    if (count > 3) _tile_stored(3, scores + 48 * kJoinedRows, 64);
    finish_stores(scores_);
  }

  // Scores of keys `own`, relative to the span, to weights[pair of keys, column]; a missing last one weighs nothing.
  void weigh(Range own) {
    Lanes highest[2] = {broadcast(kNothingSeen), broadcast(kNothingSeen)};
    for (int64_t key = own.begin; key < own.end; key++)
      highest[key % 2] = max(highest[key % 2], load(scores_ + key * kJoinedRows));
    raise_maxima(max(highest[0], highest[1]) * broadcast(scale_));
    const Lanes factor = broadcast(scale_), lowered = broadcast(0.0f) - maxima_;
    uint32_t* weights = weights_;
    for (int64_t key = own.begin; key < own.end; key += 2, weights += kJoinedRows) {
      const Lanes even = rough_exp2(fma(load(scores_ + key * kJoinedRows), factor, lowered));
      const Lanes odd = key + 1 < own.end ? rough_exp2(fma(load(scores_ + (key + 1) * kJoinedRows), factor, lowered))
                                          : broadcast(0.0f);
      totals_ = totals_ + (even + odd);
      const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even.v));
      const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd.v));
      _mm512_storeu_si512(weights, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }

  void raise_maxima(Lanes highest) {
    const Lanes raised = max(maxima_, highest);
    if (_mm512_cmp_ps_mask(raised.v, maxima_.v, _CMP_NEQ_OQ) == 0) return;
    const Lanes factors = rough_exp2(maxima_ - raised);
    alignas(64) float factor[kJoinedRows];
    store(factor, factors);
    for (int64_t row = 0; row < shape_.rows; row++) {
      float* sums = sums_ + row * shape_.head_dim;
      for (int64_t index = 0; index < shape_.head_dim; index += 16)
        store(sums + index, load(sums + index) * broadcast(factor[row]));
    }
    totals_ = totals_ * factors;
    maxima_ = raised;
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
    const int64_t offset = head * shape_.head_dim + index, num_keys = span.positions.end - span.positions.begin;
    float* sums = sums_ + row * shape_.head_dim + index;
    __m512 totals[count][halves][2];
    for (int each = 0; each < count; each++)
      for (int half = 0; half < halves; half++)
        for (int part = 0; part < 2; part++)
          totals[each][half][part] = _mm512_loadu_ps(sums + each * shape_.head_dim + half * 32 + part * 16);
    const uint32_t* weights = weights_ + row;
    for (int64_t key = 0; key < num_keys; key += 2, weights += kJoinedRows) {
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
    alignas(64) float maxima[kJoinedRows], totals[kJoinedRows];
    store(maxima, maxima_ * broadcast(1.0f / kLog2e));
    store(totals, totals_);
    finish_rows<bf16>(attention_, shape_, task_, sums_, maxima, totals);
  }

  const ShuteyeAttention& attention_;
  const AttentionTask& task_;
  const AttentionShape shape_;
  const float scale_; // of scores to exponents of 2
  float* sums_;       // [rows, head_dim]
  float* scores_;     // [kKeySpan, 16 columns]
  uint32_t* weights_; // [kKeySpan / 2, 16 columns] of pairs
  bf16* query_;
  Lanes maxima_; // of scores times scale_, per column
  Lanes totals_; // of weights, likewise
  Ahead ahead_;
};

} // namespace SHUTEYE_ISA
