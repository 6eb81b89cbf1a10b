// Attention of few rows, as when one token is decoded: keys are read row by row where they lie, in the order in which they
// stand in memory, and each meets up to kFewRows queries. Knows nothing of threads.
#pragma once
#include "attention.h"

namespace SHUTEYE_ISA {

#if defined(SHUTEYE_LANES_AVX512)
constexpr int kFewRows = 4; // sums of 4 keys, or of 2 panels of a value, for so many rows fit the registers
#else
constexpr int kFewRows = 3;
#endif

constexpr int64_t kFewSpan = 16;      // keys at a time
constexpr int64_t kJoinedBytes = 512; // of a key of several heads: with more, two spans of keys and values leave the first cache

// Of tokens one after the other, each for its own keys; any number of KV heads.
template <class A>
class FewRows {
 public:
  using Element = typename A::Element;
  using Unit = typename A::Unit;
  using Sum = typename A::Sum;
  using Keys = Span<Element, kFewSpan>;

  FewRows(const ShuteyeAttention& attention, const AttentionTask& task, void* memory)
      : attention_(attention), task_(task), shape_(attention, task),
        scale_(static_cast<float>(attention.scale) * kLog2e) {
    sums_ = static_cast<float*>(memory);
    scores_ = sums_ + shape_.rows * shape_.padded_dim;
    weights_ = reinterpret_cast<Unit*>(scores_ + kFewRows * kFewSpan);
    states_ = reinterpret_cast<RowState*>(weights_ + kFewRows * kFewSpan);
    query_ = reinterpret_cast<Unit*>(states_ + shape_.rows);
  }

  void run(const AttentionTask* following) {
    memset(sums_, 0, shape_.rows * shape_.padded_dim * sizeof(float));
    read_queries();
    const int64_t row_elements = task_.num_kv_heads * shape_.head_dim;
    each_span<Element, kFewSpan>(attention_, task_, following, [&](const Keys& span, const Keys& next) {
      ahead_ = Ahead<Keys, 3>(next, row_elements);
      for (int64_t token = 0; token < task_.num_tokens; token++) {
        const Range seen = seen_by(attention_, task_, token);
        const Range range{larger(seen.begin, span.positions.begin) - span.positions.begin,
                          smaller(seen.end, span.positions.end) - span.positions.begin};
        if (range.begin >= range.end) continue;
        for (int64_t head = 0; head < task_.num_kv_heads; head++) attend_head(span, range, token, head);
      }
    });
    end();
  }

 private:
  int64_t query_stride() const { return shape_.padded_dim / A::unit_size; }

  void read_queries() {
    using T = typename A::Query;
    for (int64_t row = 0; row < shape_.rows; row++) {
      states_[row] = RowState();
      const T* source = query_row<T>(attention_, shape_, task_, row);
      states_[row].scale = scale_ * A::read_query(source, shape_.head_dim, query_ + row * query_stride(), true);
    }
  }

  void attend_head(const Keys& span, Range range, int64_t token, int64_t head) {
    if constexpr (kHasScales<Element>) read_scales(span, range, head);
    const int64_t first = token * shape_.heads + head * shape_.group, end = first + shape_.group;
    int64_t row = first;
    if (shape_.group % kFewRows == 1 && kFewRows == 3 && shape_.group > 1) { // two and two instead of three and one
      for (; end - row > 4; row += 3) attend_rows<3>(span, range, row, head);
      for (; row < end; row += 2) attend_rows<2>(span, range, row, head);
      return;
    }
    for (; row + kFewRows <= end; row += kFewRows) attend_rows<kFewRows>(span, range, row, head);
    switch (end - row) {
      case 1: return attend_rows<1>(span, range, row, head);
      case 2: return attend_rows<2>(span, range, row, head);
      case 3: return attend_rows<3>(span, range, row, head);
      default: return;
    }
  }

  // Of the keys and values of a range; padded with zeros to whole vectors.
  void read_scales(const Keys& span, Range range, int64_t head) {
    const int64_t offset = head * attention_.cache.block_size, num_keys = range.end - range.begin;
    const float* first = span.scales.keys[range.begin] + offset;
    if (span.scales.in_one_block && num_keys % Lanes::width == 0) {
      key_scales_ = first;
      value_scales_ = first + span.scales.to_values;
      return;
    }
    memset(scales_, 0, sizeof scales_);
    for (int64_t key = 0; key < num_keys; key++) {
      const float* own = span.scales.keys[range.begin + key] + offset;
      scales_[0][key] = *own;
      scales_[1][key] = own[span.scales.to_values];
    }
    key_scales_ = scales_[0];
    value_scales_ = scales_[1];
  }

  template <int count>
  void attend_rows(const Keys& span, Range range, int64_t row, int64_t head) {
    const int64_t offset = head * shape_.head_dim, num_keys = range.end - range.begin;
    const int64_t width = round_up(num_keys, Lanes::width); // padded with keys that weigh nothing
    for (int64_t key = 0; key < num_keys; key += 4) {
      const Element* four[4];
      for (int64_t each = 0; each < 4; each++)
        four[each] = span.keys[range.begin + smaller(key + each, num_keys - 1)] + offset;
      ahead_.fetch(kLinesAtOnce);
      score_four<count>(four, query_ + row * query_stride(), scores_ + key);
    }
    for (int each = 0; each < count; each++) {
      float* scores = scores_ + each * kFewSpan;
      if constexpr (kHasScales<Element>) multiply_each(scores, key_scales_, width);
      for (int64_t key = num_keys; key < width; key++) scores[key] = -__builtin_inff();
      Unit* weights = weights_ + each * kFewSpan;
      float factor;
      if constexpr (kHasScales<Element>) {
        factor = weigh<typename A::Weights>(scores, width, states_[row + each], scores);
        weight_factors_[each] = A::scale_weights(scores, value_scales_, width, weights);
      } else {
        factor = weigh<A>(scores, width, states_[row + each], weights);
      }
      if (factor != 1.0f) scale_sums(sums_ + (row + each) * shape_.padded_dim, shape_.padded_dim, factor);
    }
    float* sums = sums_ + row * shape_.padded_dim;
    const Element* const* values = span.values + range.begin;
    int64_t index = 0;
    const auto read = [](const Element* place) { return A::Read::read(place); };
    for (; index + 2 * kPanel <= shape_.head_dim; index += 2 * kPanel)
      add_values<count, 2>(values, num_keys, offset + index, sums + index, read);
    for (; index + kPanel <= shape_.head_dim; index += kPanel)
      add_values<count, 1>(values, num_keys, offset + index, sums + index, read);
    if (index == shape_.head_dim) return;
    PanelEnd<typename A::Read, Element> end(shape_.head_dim - index);
    add_values<count, 1>(values, num_keys, offset + index, sums + index,
                         [&](const Element* place) { return end.read(place); });
  }

  template <int count>
  SHUTEYE_INLINE void score_four(const Element* const (&keys)[4], const Unit* query, float* scores) const {
    const auto read = [](const Element* key) { return A::Read::read(key); };
    const int64_t whole = shape_.head_dim / kPanel * kPanel;
    Sum products[count][4];
    for (auto& row : products)
      for (Sum& product : row) product = A::nothing();
    for (int64_t index = 0; index < whole; index += kPanel) add_products<count>(keys, query, index, products, read);
    if (whole == shape_.head_dim) {
      for (int row = 0; row < count; row++) sums_of_four(products[row], scores + row * kFewSpan);
      return;
    }
    Sum all[count][4];
    for (int row = 0; row < count; row++)
      for (int key = 0; key < 4; key++) all[row][key] = products[row][key];
    add_end<count>(keys, query, whole, all);
    for (int row = 0; row < count; row++) sums_of_four(all[row], scores + row * kFewSpan);
  }

  template <int count> // not inlined, and given a copy: its calls would drive the sums out of registers
  __attribute__((noinline)) void add_end(const Element* const (&keys)[4], const Unit* query, int64_t index,
                                         Sum (&products)[count][4]) const {
    PanelEnd<typename A::Read, Element> end(shape_.head_dim - index);
    add_products<count>(keys, query, index, products, [&](const Element* key) { return end.read(key); });
  }

  template <int count, class Read>
  SHUTEYE_INLINE void add_products(const Element* const (&keys)[4], const Unit* query, int64_t index,
                                   Sum (&products)[count][4], const Read& read) const {
    for (int part = 0; part < A::key_parts; part++) {
      const Unit* units = query + index / A::unit_size + part * Lanes::width;
      typename A::Vector own[count]; // of three rows by four keys: with them and a key every register is taken
      for (int row = 0; row < count; row++) own[row] = A::load_units(units + row * query_stride());
      for (int key = 0; key < 4; key++) {
        const auto vector = A::key_part(read(keys[key] + index), part);
        for (int row = 0; row < count; row++) A::add_product(vector, own[row], products[row][key]);
      }
    }
  }

  // sums[row] += weights[row, key] * values[key] for `count` rows and as many panels; read(place, panel) reads one.
  template <int count, int panels, class Read>
  SHUTEYE_INLINE void add_values(const Element* const* values, int64_t num_keys, int64_t offset, float* sums,
                                 const Read& read) {
    Sum totals[count][2 * panels];
    for (int row = 0; row < count; row++)
      for (int part = 0; part < 2 * panels; part++)
        totals[row][part] = A::resumed(sums + row * shape_.padded_dim + part * Lanes::width);
    const Unit* weights = weights_;
    for (int64_t key = 0; key < num_keys; key += A::unit_size, weights++) {
      if (key % 4 == 0) ahead_.fetch(kLinesAtOnce);
      const Element* places[A::unit_size];
      for (int64_t each = 0; each < A::unit_size; each++) // one that is missing weighs nothing
        places[each] = values[smaller(key + each, num_keys - 1)] + offset;
      typename A::Vector weight[count];
      for (int row = 0; row < count; row++) weight[row] = A::spread(weights + row * kFewSpan);
      for (int panel = 0; panel < panels; panel++) {
        typename A::Read own[A::unit_size];
        for (int64_t each = 0; each < A::unit_size; each++) own[each] = read(places[each] + panel * kPanel);
        for (int part = 0; part < 2; part++) {
          const auto vector = A::value_part(own, part);
          for (int row = 0; row < count; row++)
            totals[row][panel * 2 + part] = A::multiply_add(vector, weight[row], totals[row][panel * 2 + part]);
        }
      }
    }
    for (int row = 0; row < count; row++)
      for (int part = 0; part < 2 * panels; part++)
        A::keep(sums + row * shape_.padded_dim + part * Lanes::width, totals[row][part], weight_factors_[row]);
  }

  void end() {
    for (int64_t row = 0; row < shape_.rows; row++)
      finish_sums<A>(attention_, shape_, task_, row, sums_ + row * shape_.padded_dim, states_[row]);
  }

  static constexpr int64_t kLinesAtOnce = 6; // of what is used next, for every four keys

  const ShuteyeAttention& attention_;
  const AttentionTask& task_;
  const AttentionShape shape_;
  const float scale_; // of scores to exponents of 2
  float* sums_;       // [rows, padded_dim], in the order of A's values
  float* scores_;     // [kFewRows, kFewSpan]
  Unit* weights_;     // likewise; units of several keys fill a part
  RowState* states_;  // [rows]
  Unit* query_;       // [rows, padded_dim / unit_size]
  Ahead<Keys, 3> ahead_;
  const float* key_scales_ = nullptr; // of the keys at hand, whole vectors; of a cache that has scales
  const float* value_scales_ = nullptr;
  float scales_[2][kFewSpan];
  float weight_factors_[kFewRows]; // what weights as units must be multiplied by
};

} // namespace SHUTEYE_ISA
