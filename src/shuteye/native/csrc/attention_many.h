// Attention of many rows, as when a prompt is computed: a span of keys and values is packed once for all of them, then
// scores and sums are products of a few rows by panels, held in registers. Knows nothing of threads.
#pragma once
#include "attention.h"

namespace SHUTEYE_ISA {

#if defined(SHUTEYE_LANES_AVX512)
constexpr int kStripRows = 12; // by a panel: 24 sums, and three more registers
#else
constexpr int kStripRows = 6;
#endif
constexpr int64_t kMinManyRows = 12; // of a KV head; with fewer, packing costs more than it saves

// out[row, panel] (+)= units[row] panel, over `num_units` units.
template <class A, int count, bool adds>
inline void multiply_panel(const typename A::Unit* units, int64_t stride, const typename A::Unit* panel,
                           int64_t num_units, float* out, int64_t out_stride) {
  Lanes sums[count][2];
  for (int row = 0; row < count; row++)
    for (int part = 0; part < 2; part++)
      sums[row][part] = adds ? load(out + row * out_stride + part * Lanes::width) : broadcast(0.0f);
  for (int64_t unit = 0; unit < num_units; unit++, panel += kPanel) {
    const auto first = A::load_units(panel), second = A::load_units(panel + Lanes::width);
    for (int row = 0; row < count; row++) {
      const auto own = A::spread(units + row * stride + unit);
      sums[row][0] = A::multiply_add(first, own, sums[row][0]);
      sums[row][1] = A::multiply_add(second, own, sums[row][1]);
    }
  }
  for (int row = 0; row < count; row++)
    for (int part = 0; part < 2; part++) store(out + row * out_stride + part * Lanes::width, sums[row][part]);
}

// -inf before and after a range of keys, 0 in it.
struct Limits {
  float values[3 * kManySpan];

  Limits() {
    for (int64_t index = 0; index < 3 * kManySpan; index++)
      values[index] = index / kManySpan == 1 ? 0.0f : -__builtin_inff();
  }
  // Scores [first, end), whole vectors; the row sees those of `range` only.
  void apply(float* scores, int64_t first, int64_t end, Range range) const {
    for (int64_t key = first; key < end; key += Lanes::width) {
      const Lanes from = load(values + kManySpan + key - range.begin), to = load(values + 2 * kManySpan + key - range.end);
      store(scores + key, load(scores + key) + from + to);
    }
  }
};

// Of a cache of C, which becomes A's elements span by span if it holds others.
template <class A, class C = typename A::Element>
class ManyRows {
 public:
  using Element = typename A::Element;
  using Unit = typename A::Unit;

  ManyRows(const ShuteyeAttention& attention, const AttentionTask& task, void* memory)
      : attention_(attention), task_(task), shape_(attention, task),
        scale_(static_cast<float>(attention.scale) * kLog2e), num_rows_(round_up(shape_.rows, kStripRows)),
        width_(round_up(shape_.head_dim, kPanel)), num_units_((shape_.head_dim + A::unit_size - 1) / A::unit_size) {
    sums_ = static_cast<float*>(memory);
    scores_ = sums_ + num_rows_ * width_;
    keys_ = reinterpret_cast<Unit*>(scores_ + kStripRows * kManySpan);
    values_ = keys_ + kManySpan * width_;
    weights_ = values_ + kManySpan * width_;
    query_ = weights_ + kStripRows * kManySpan;
    states_ = reinterpret_cast<RowState*>(query_ + num_rows_ * width_);
    expanded_ = reinterpret_cast<Element*>(states_ + num_rows_);
  }

  void run() {
    memset(sums_, 0, num_rows_ * width_ * sizeof(float));
    memset(weights_, 0, kStripRows * kManySpan * sizeof(Unit)); // of rows that do not exist
    memset(query_, 0, num_rows_ * width_ * sizeof(Unit));
    read_queries();
    each_span<C, kManySpan>(attention_, task_, nullptr, [&](const Span<C, kManySpan>& span, const Span<C, kManySpan>& next) {
      if constexpr (__is_same(C, Element)) pack(span);
      else pack(expanded(span, shape_.head_dim, expanded_));
      Ahead<Span<C, kManySpan>> ahead(next, shape_.head_dim);
      const int64_t lines = 2 * next.size() * (shape_.head_dim * static_cast<int64_t>(sizeof(C)) / 64 + 1);
      for (int64_t row = 0; row < num_rows_; row += kStripRows) {
        ahead.fetch(lines * kStripRows / num_rows_ + 1);
        attend_strip(span.positions, row);
      }
    });
    for (int64_t row = 0; row < shape_.rows; row++)
      finish_sums<A>(attention_, shape_, task_, row, sums_ + row * width_, states_[row]);
  }

 private:
  int64_t query_stride() const { return width_ / A::unit_size; }

  void read_queries() {
    using T = typename A::Query;
    for (int64_t row = 0; row < shape_.rows; row++) {
      states_[row] = RowState();
      const T* source = query_row<T>(attention_, shape_, task_, row);
      states_[row].scale = scale_ * A::read_query(source, shape_.head_dim, query_ + row * query_stride(), false);
    }
  }

  // Keys: [keys / kPanel][units][kPanel]; values: [dimensions / kPanel][units of keys][kPanel].
  void pack(const Span<Element, kManySpan>& span) {
    const int64_t num_keys = span.size();
    for (int64_t key = 0; key < num_keys; key += kPanel)
      A::pack_keys(span.keys + key, num_keys - key, shape_.head_dim, keys_ + key * num_units_);
    for (int64_t index = 0; index < shape_.head_dim; index += kPanel) {
      PanelEnd<typename A::Read, Element> end(shape_.head_dim - index);
      for (int64_t key = 0; key < round_up(num_keys, kPanel); key += A::unit_size) {
        Unit* target = values_ + (index * kManySpan + key * kPanel) / A::unit_size;
        if (key >= num_keys) {
          memset(target, 0, kPanel * sizeof(Unit));
          continue;
        }
        typename A::Read read[A::unit_size];
        for (int64_t each = 0; each < A::unit_size && key + each < num_keys; each++)
          read[each] = end.read(span.values[key + each] + index);
        for (int part = 0; part < 2; part++) A::store_units(target + part * Lanes::width, A::value_part(read, part));
      }
    }
  }

  Range range_of(Range positions, int64_t row) const { // relative to the span
    const Range seen = seen_by(attention_, task_, smaller(row, shape_.rows - 1) / shape_.heads);
    return {larger(seen.begin, positions.begin) - positions.begin, smaller(seen.end, positions.end) - positions.begin};
  }

  void attend_strip(Range positions, int64_t row) {
    const Range first = range_of(positions, row), last = range_of(positions, row + kStripRows - 1);
    const int64_t begin = first.begin / kPanel * kPanel, end = round_up(last.end, kPanel);
    if (begin >= end) return;
    for (int64_t key = begin; key < end; key += kPanel)
      multiply_panel<A, kStripRows, false>(query_ + row * query_stride(), query_stride(), keys_ + key * num_units_,
                                           num_units_, scores_ + key, kManySpan);
    for (int64_t each = 0; each < smaller<int64_t>(kStripRows, shape_.rows - row); each++)
      weigh_row({begin, end}, range_of(positions, row + each), row + each, each);
    const Unit* weights = weights_ + begin / A::unit_size;
    for (int64_t index = 0; index < width_; index += kPanel)
      multiply_panel<A, kStripRows, true>(weights, kManySpan, values_ + (index * kManySpan + begin * kPanel) / A::unit_size,
                                          (end - begin) / A::unit_size, sums_ + row * width_ + index, width_);
  }

  void weigh_row(Range all, Range own, int64_t row, int64_t each) {
    static const Limits limits;
    float* scores = scores_ + each * kManySpan;
    if (own.begin >= own.end) own = {0, 0}; // no key of this span
    if (own.begin > all.begin || own.end < all.end) limits.apply(scores, all.begin, all.end, own);
    Unit* weights = weights_ + each * kManySpan + all.begin / A::unit_size;
    const float factor = weigh<A>(scores + all.begin, all.end - all.begin, states_[row], weights);
    if (factor != 1.0f) scale_sums(sums_ + row * width_, width_, factor);
  }

  const ShuteyeAttention& attention_;
  const AttentionTask& task_;
  const AttentionShape shape_;
  const float scale_; // of scores to exponents of 2
  const int64_t num_rows_;  // whole strips
  const int64_t width_;     // whole panels of dimensions
  const int64_t num_units_; // of a key
  float* sums_;      // [num_rows, width], in the order of A's values
  float* scores_;    // [kStripRows, kManySpan]
  Unit* keys_;       // of a span
  Unit* values_;
  Unit* weights_;    // [kStripRows, kManySpan]
  Unit* query_;      // [num_rows, width / unit_size]
  RowState* states_; // [rows]
  Element* expanded_; // [2, kManySpan, head_dim], a span of a cache of others
};

} // namespace SHUTEYE_ISA
