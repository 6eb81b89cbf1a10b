// What attention over paged keys and values is made of: which rows a tile has, which keys they see, where those lie; the
// online softmax (arXiv:2205.14135) of a row; results and their merging. Knows nothing of threads, nor of how the tiles
// were chosen, nor how queries meet keys: attention_few.h and attention_many.h do.
//
// A tile's rows are its tokens times the query heads of its KV heads, token by token. Row r sees the key positions
// [first_seen(r), position(r)], cut to the task's range: only those are ever computed with, so that what lies in blocks
// past a context's end, NaN included, is never touched.
#pragma once
#include "attention_arithmetic.h"
#include "rope.h"

namespace SHUTEYE_ISA {

using shuteye::AttentionTask;
using shuteye::kKeySpan;
using shuteye::kManySpan;
using shuteye::round_up;

constexpr float kLog2e = 1.44269504f;

struct AttentionShape {
  int64_t group; // query heads per KV head
  int64_t heads; // query heads of the task's KV heads
  int64_t rows;
  int64_t head_dim;
  int64_t padded_dim;

  AttentionShape(const ShuteyeAttention& attention, const AttentionTask& task) {
    group = attention.num_heads / attention.cache.num_kv_heads;
    heads = task.num_kv_heads * group;
    rows = task.num_tokens * heads;
    head_dim = attention.cache.head_dim;
    padded_dim = round_up(head_dim, shuteye::kDepthStep);
  }
};

// Key positions [begin, end).
struct Range {
  int64_t begin;
  int64_t end;
};

inline Range seen_by(const ShuteyeAttention& attention, const AttentionTask& task, int64_t token) {
  const int64_t position = task.first_position + token;
  const int64_t first = attention.window ? larger<int64_t>(0, position - attention.window + 1) : 0;
  return {larger(first, task.key_begin), smaller(position + 1, task.key_end)};
}

// Where the scales of a span's keys and values are.
template <class C, int64_t capacity>
struct SpanScales {};

template <int64_t capacity>
struct SpanScales<i8, capacity> {
  const float* keys[capacity]; // of the task's first KV head; of the next one `block_size` floats further
  int64_t to_values;           // floats from a key's scale to its value's
  bool in_one_block;           // they stand side by side
};

// The rows of the cache that hold the keys and values of consecutive positions, for one KV head.
template <class C, int64_t capacity = kKeySpan>
struct Span {
  using Element = C;

  const C* keys[capacity];
  const C* values[capacity];
  Range positions{0, 0};
  SpanScales<C, capacity> scales;

  int64_t size() const { return positions.end - positions.begin; }

  Span() = default;
  Span(const ShuteyeAttention& attention, const AttentionTask& task, Range range) : positions(range) {
    const ShuteyeCache& cache = attention.cache;
    const int64_t* table = attention.sequences.tables + attention.sequences.table_starts[task.sequence];
    const int64_t stride = cache.num_kv_heads * cache.head_dim, half = half_bytes<C>(cache) / static_cast<int64_t>(sizeof(C));
    int64_t block = range.begin / cache.block_size, offset = range.begin % cache.block_size, count = 0;
    if constexpr (kHasScales<C>) {
      scales.to_values = half / static_cast<int64_t>(sizeof(float));
      scales.in_one_block = offset + size() <= cache.block_size;
    }
    while (count < range.end - range.begin) { // division is slow: once per block, not per key
      C* first = cache_block<C>(cache, attention.layer, 0, table[block]);
      const C* key = first + offset * stride + task.kv_head * cache.head_dim;
      for (; offset < cache.block_size && count < range.end - range.begin; offset++, count++, key += stride) {
        keys[count] = key;
        values[count] = key + half;
        if constexpr (kHasScales<C>) scales.keys[count] = cache_scales(cache, first) + task.kv_head * cache.block_size + offset;
      }
      offset = 0;
      block++;
    }
  }
};

// A span for one KV head as rows of E, which are written to `rows`, [2, keys of the span, head_dim].
template <class E, class C, int64_t capacity>
inline Span<E, capacity> expanded(const Span<C, capacity>& span, int64_t head_dim, E* rows) {
  Span<E, capacity> own;
  own.positions = span.positions;
  for (int64_t key = 0; key < span.size(); key++) {
    float scales[2] = {1.0f, 1.0f};
    if constexpr (kHasScales<C>) {
      scales[0] = *span.scales.keys[key];
      scales[1] = span.scales.keys[key][span.scales.to_values];
    }
    for (int half = 0; half < 2; half++) {
      const C* source = half ? span.values[key] : span.keys[key];
      E* target = rows + (half * span.size() + key) * head_dim;
      (half ? own.values : own.keys)[key] = target;
      for_lanes(head_dim, [&](int64_t index, int64_t count) {
        store_some(target + index, load_some(source + index, count) * broadcast(scales[half]), count);
      });
    }
  }
  return own;
}

// The keys and values that are used next: fetched line by line, in the order in which they lie, which memory answers as
// fast as one long run; a few at a time, or the fetches wait for each other. Into the second cache, or the first (3).
template <class Span, int locality = 2>
class Ahead {
 public:
  Ahead() = default;
  Ahead(const Span& span, int64_t row_elements) // of `span`, which must stay where it is
      : span_(&span), row_bytes_(row_elements * sizeof(typename Span::Element)), num_keys_(span.size()) {}

  SHUTEYE_INLINE void fetch(int64_t num_lines) {
    for (; num_lines > 0 && row_ < 2 * num_keys_; num_lines--) { // keys, then values
      const auto* row = row_ < num_keys_ ? span_->keys[row_] : span_->values[row_ - num_keys_];
      __builtin_prefetch(reinterpret_cast<const char*>(row) + byte_, 0, locality);
      byte_ += 64;
      if (byte_ < row_bytes_) continue;
      byte_ = 0;
      row_++;
    }
  }

 private:
  const Span* span_ = nullptr;
  int64_t row_bytes_ = 0;
  int64_t num_keys_ = 0;
  int64_t row_ = 0;
  int64_t byte_ = 0;
};

constexpr float kMostAbove = 8.0f; // weights are at most 2^8

// What a row has seen so far. An exponent is a score times scale, to base 2; a weight is 2^(exponent - reference), where the
// reference is the highest exponent as it was when one stood out by more than kMostAbove: that is seldom, so that most
// rounds neither look for their own highest nor scale what was summed before.
struct RowState {
  float scale = 0.0f;       // of its scores, to exponents
  float reference = -1e30f; // nothing seen: finite, as differences of it are
  float totals[Lanes::width] = {}; // of weights, lane by lane

  float maximum() const { return reference * (1.0f / kLog2e); } // of scores times scale, as `merge` takes it
  float total() const { return sum(load(totals)); }

  // Gives what sums so far must be multiplied by.
  float raise(float highest) {
    float factors[Lanes::width];
    store(factors, exp2_for(broadcast(reference - highest), float{}));
    store(totals, load(totals) * broadcast(factors[0]));
    reference = highest;
    return factors[0];
  }
};

// Turns `count` scores, whole vectors, into weights, as units; those of -inf are 0. Gives what the row's sums so far must
// be multiplied by.
template <class A>
inline float weigh(const float* scores, int64_t count, RowState& row, typename A::Unit* weights) {
  Lanes highest = load(scores);
  for (int64_t key = Lanes::width; key < count; key += Lanes::width) highest = max(highest, load(scores + key));
  const Lanes factor = broadcast(row.scale);
  float lightened = 1.0f;
  if (any_above(highest * factor, row.reference + kMostAbove)) lightened = row.raise(largest(highest) * row.scale);
  const Lanes lowered = broadcast(-row.reference);
  Lanes added = load(row.totals);
  for (int64_t key = 0; key < count; key += Lanes::width) {
    const Lanes found = exp2_for(fma(load(scores + key), factor, lowered), typename A::Element{});
    added = added + A::to_units(found, key, weights);
  }
  store(row.totals, added);
  return lightened;
}

// Numbers times factors of their own, whole vectors.
inline void multiply_each(float* numbers, const float* factors, int64_t count) {
  for (int64_t index = 0; index < count; index += Lanes::width)
    store(numbers + index, load(numbers + index) * load(factors + index));
}

inline void scale_sums(float* sums, int64_t count, float factor) { // whole vectors
  for (int64_t index = 0; index < count; index += Lanes::width)
    store(sums + index, load(sums + index) * broadcast(factor));
}

template <class T>
inline const T* query_row(const ShuteyeAttention& attention, const AttentionShape& shape, const AttentionTask& task,
                          int64_t row) {
  const int64_t token = task.first_token + row / shape.heads;
  const int64_t head = task.kv_head * shape.group + row % shape.heads;
  return static_cast<const T*>(attention.query) + token * attention.query_stride + head * shape.head_dim;
}

template <class T>
inline void write_row(const ShuteyeAttention& attention, const AttentionShape& shape, const AttentionTask& task,
                      int64_t row, const float* sums, float total) {
  const int64_t token = task.first_token + row / shape.heads;
  const int64_t head = task.kv_head * shape.group + row % shape.heads;
  const int64_t width = attention.num_heads * shape.head_dim, first = head * shape.head_dim;
  T* out = static_cast<T*>(attention.out);
  const Lanes factor = broadcast(1.0f / total);
  for_lanes(shape.head_dim, [&](int64_t index, int64_t count) {
    const int64_t offset = attention.packs_out ? shuteye::packed_offset(token, first + index, width)
                                               : token * width + first + index;
    store_some(out + offset, load_some(sums + index, count) * factor, count);
  });
}

// Writes a row's result, or what `merge` needs of it.
template <class T>
void finish_row(const ShuteyeAttention& attention, const AttentionShape& shape, const AttentionTask& task, int64_t row,
                const float* sums, float maximum, float total) {
  if (!task.partial) return write_row<T>(attention, shape, task, row, sums, total);
  float* part = task.partial + row * (shape.head_dim + 2);
  memcpy(part, sums, shape.head_dim * sizeof(float));
  part[shape.head_dim] = maximum;
  part[shape.head_dim + 1] = total;
}

// The same for sums in the order of A's values, whole panels of them.
template <class A>
void finish_sums(const ShuteyeAttention& attention, const AttentionShape& shape, const AttentionTask& task, int64_t row,
                 float* sums, const RowState& state) {
  for (int64_t index = 0; index < shape.head_dim; index += kPanel) {
    Lanes two[2] = {load(sums + index), load(sums + index + Lanes::width)};
    A::order(two);
    store(sums + index, two[0]);
    store(sums + index + Lanes::width, two[1]);
  }
  finish_row<typename A::Query>(attention, shape, task, row, sums, state.maximum(), state.total());
}

// body(span, next) for all keys that the task sees, `span_keys` at a time. After the last span the first of the `following`
// task is the next, or an empty one.
template <class T, int64_t span_keys = kKeySpan, class Body>
void each_span(const ShuteyeAttention& attention, const AttentionTask& task, const AttentionTask* following,
               const Body& body) {
  const auto span_from = [&](const AttentionTask& own, int64_t first) {
    const int64_t end = seen_by(attention, own, own.num_tokens - 1).end;
    return Span<T, span_keys>(attention, own, {first, smaller(first + span_keys, end)});
  };
  const int64_t begin = seen_by(attention, task, 0).begin, end = seen_by(attention, task, task.num_tokens - 1).end;
  Span<T, span_keys> spans[2] = {span_from(task, begin), {}};
  for (int64_t first = begin, index = 0; first < end; first += span_keys, index++) {
    Span<T, span_keys>& next = spans[(index + 1) % 2];
    if (first + span_keys < end) next = span_from(task, first + span_keys);
    else next = following ? span_from(*following, seen_by(attention, *following, 0).begin) : Span<T, span_keys>();
    body(spans[index % 2], next);
  }
}

// Merges the `num_parts` partial results at task.partial, one after the other, and writes the result.
template <class T>
void merge(const ShuteyeAttention& attention, const AttentionTask& task, int64_t num_parts) {
  const AttentionShape shape(attention, task);
  const int64_t part_stride = shuteye::partial_floats(shape.rows, shape.head_dim);
  for (int64_t row = 0; row < shape.rows; row++) {
    float* first = task.partial + row * (shape.head_dim + 2);
    float highest = first[shape.head_dim];
    for (int64_t part = 1; part < num_parts; part++) highest = larger(highest, first[part * part_stride + shape.head_dim]);
    float total = 0.0f;
    for (int64_t part = 0; part < num_parts; part++) {
      float* own = first + part * part_stride;
      float factors[Lanes::width];
      store(factors, exp(broadcast(own[shape.head_dim] - highest)));
      total += own[shape.head_dim + 1] * factors[0];
      for_lanes(shape.head_dim, [&](int64_t index, int64_t count) {
        const Lanes scaled = load_some(own + index, count) * broadcast(factors[0]);
        store_some(first + index, part ? load_some(first + index, count) + scaled : scaled, count);
      });
    }
    write_row<T>(attention, shape, task, row, first, total);
  }
}

} // namespace SHUTEYE_ISA
