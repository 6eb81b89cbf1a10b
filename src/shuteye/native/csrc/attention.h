// Attention of a tile of queries over paged keys and values, read where they lie; online softmax (arXiv:2205.14135).
// Knows nothing of threads, nor of how the tiles were chosen.
//
// A tile's rows are its tokens times the query heads of its KV heads, token by token. Row r sees the key positions
// [first_seen(r), position(r)], cut to the task's range: only those are ever computed with, so that what lies in blocks
// past a context's end, NaN included, is never touched.
#pragma once
#include "dot.h"
#include "rope.h"

namespace SHUTEYE_ISA {

using shuteye::AttentionTask;
using shuteye::kKeySpan;

constexpr int64_t kRowGroup = 4;    // rows that share the loading of a key or value
constexpr int64_t kValueVectors = 4; // vectors of a value that one group holds in registers

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
    padded_dim = shuteye::round_up(head_dim, shuteye::kDepthStep);
  }
};

struct AttentionScratch {
  void* query;   // [rows, padded_dim] as the dot product wants them (float or bfloat16), padding zero
  float* sums;   // [rows, padded_dim], of values, weighted
  float* scores; // [rows, kKeySpan]
  float* maxima; // [rows]
  float* totals; // [rows], of weights

  AttentionScratch(void* memory, const AttentionShape& shape) {
    query = memory;
    sums = static_cast<float*>(memory) + shape.rows * shape.padded_dim;
    scores = sums + shape.rows * shape.padded_dim;
    maxima = scores + shape.rows * kKeySpan;
    totals = maxima + shape.rows;
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

// The rows of the cache that hold the keys and values of consecutive positions, for one KV head.
template <class T>
struct Span {
  const T* keys[kKeySpan];
  const T* values[kKeySpan];
  Range positions{0, 0};

  int64_t size() const { return positions.end - positions.begin; }

  Span() = default;
  Span(const ShuteyeAttention& attention, const AttentionTask& task, Range range) : positions(range) {
    const ShuteyeCache& cache = attention.cache;
    const int64_t* table = attention.sequences.tables + attention.sequences.table_starts[task.sequence];
    const int64_t stride = cache.num_kv_heads * cache.head_dim;
    int64_t block = range.begin / cache.block_size, offset = range.begin % cache.block_size, count = 0;
    while (count < range.end - range.begin) { // division is slow: once per block, not per key
      const T* first = cache_row<T>(cache, attention.layer, 0, table[block] * cache.block_size);
      const T* key = first + offset * stride + task.kv_head * cache.head_dim;
      for (; offset < cache.block_size && count < range.end - range.begin; offset++, count++, key += stride) {
        keys[count] = key;
        values[count] = key + cache.block_size * stride;
      }
      offset = 0;
      block++;
    }
  }
};

// Rows are short and scattered, which hardware does not foresee: the next span's are fetched while this one is used.
template <class T>
inline void prefetch_row(const T* row, int64_t head_dim) {
  for (int64_t byte = 0; byte < head_dim * static_cast<int64_t>(sizeof(T)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(row) + byte);
}

// The keys and values that are used next: fetched line by line, in the order in which they lie, which memory answers as
// fast as one long run; a few at a time, or the fetches wait for each other.
template <class T>
class Ahead {
 public:
  Ahead() = default;
  Ahead(const Span<T>& span, int64_t row_elements) // of `span`, which must stay where it is
      : span_(&span), row_bytes_(row_elements * sizeof(T)), num_keys_(span.size()) {}

  void fetch(int64_t num_lines) {
    for (; num_lines > 0 && row_ < 2 * num_keys_; num_lines--) { // keys, then values
      const T* row = row_ < num_keys_ ? span_->keys[row_] : span_->values[row_ - num_keys_];
      __builtin_prefetch(reinterpret_cast<const char*>(row) + byte_, 0, 2);
      byte_ += 64;
      if (byte_ < row_bytes_) continue;
      byte_ = 0;
      row_++;
    }
  }

 private:
  const Span<T>* span_ = nullptr;
  int64_t row_bytes_ = 0;
  int64_t num_keys_ = 0;
  int64_t row_ = 0;
  int64_t byte_ = 0;
};

template <class Dot>
void read_queries(const ShuteyeAttention& attention, const AttentionTask& task, const AttentionShape& shape,
                  typename Dot::X* query) {
  using T = typename Dot::Weight;
  for (int64_t row = 0; row < shape.rows; row++) {
    const int64_t token = task.first_token + row / shape.heads;
    const int64_t head = task.kv_head * shape.group + row % shape.heads;
    const T* source = static_cast<const T*>(attention.query) + token * attention.query_stride + head * shape.head_dim;
    auto* target = query + row * shape.padded_dim;
    for_lanes(shape.head_dim, [&](int64_t index, int64_t count) {
      store_some(target + index, load_some(source + index, count), count);
    });
    memset(target + shape.head_dim, 0, (shape.padded_dim - shape.head_dim) * sizeof(*target));
  }
}

// Scores of 4 keys (or, at the end, of the last one four times) for `count` rows.
template <class Dot, int count>
inline void score_four(const AttentionShape& shape, const typename Dot::X* query, const typename Dot::Weight* const* keys,
                       float* (&scores)[count]) {
  Lanes products[count][4];
  for (auto& row : products)
    for (Lanes& product : row) product = broadcast(0.0f);
  typename Dot::Vector lanes[4];
  int64_t index = 0;
  const auto accumulate = [&] {
    for (int row = 0; row < count; row++) {
      const typename Dot::Vector own = Dot::read_x(query + row * shape.padded_dim + index);
      for (int key = 0; key < 4; key++) products[row][key] = Dot::multiply_add(lanes[key], own, products[row][key]);
    }
  };
  for (; index + Dot::step <= shape.head_dim; index += Dot::step) {
    for (int key = 0; key < 4; key++) lanes[key] = Dot::read(keys[key] + index);
    accumulate();
  }
  if (index < shape.head_dim) {
    for (int key = 0; key < 4; key++) lanes[key] = Dot::read(keys[key] + index, shape.head_dim - index);
    accumulate();
  }
  for (int row = 0; row < count; row++) sum_four(products[row], scores[row]);
}

// scores[row, key], not scaled yet, for `count` rows and keys [range.begin, range.end) of the span.
template <class Dot, int count>
inline void score_rows(const AttentionShape& shape, const typename Dot::X* query, const Span<typename Dot::Weight>& span,
                       const Span<typename Dot::Weight>& next, Range range, float* scores) {
  const int64_t num_next = next.size();
  for (int64_t key = range.begin; key < range.end; key += 4) {
    const typename Dot::Weight* four[4];
    for (int each = 0; each < 4; each++) {
      four[each] = span.keys[smaller(key + each, range.end - 1)];
      if (key + each < num_next) prefetch_row(next.keys[key + each], shape.head_dim);
    }
    const int64_t num_keys = smaller<int64_t>(4, range.end - key);
    float few[count][4];
    float* found[count];
    for (int row = 0; row < count; row++) found[row] = num_keys == 4 ? scores + row * kKeySpan + key : few[row];
    score_four<Dot, count>(shape, query, four, found);
    if (num_keys == 4) continue;
    for (int row = 0; row < count; row++) memcpy(scores + row * kKeySpan + key, few[row], num_keys * sizeof(float));
  }
}

inline float largest_of(const float* values, int64_t count) {
  Lanes highest = broadcast(values[0]);
  int64_t index = 0;
  for (; index + Lanes::width <= count; index += Lanes::width) highest = max(highest, load(values + index));
  float result = largest(highest);
  for (; index < count; index++) result = larger(result, values[index]);
  return result;
}

// Turns a row's scores into weights, relative to the row's new maximum, and scales what was summed before.
inline void weigh_row(float* scores, Range range, float scale, float& maximum, float& total, float* sums, int64_t width) {
  const float highest = larger(maximum, largest_of(scores + range.begin, range.end - range.begin) * scale);
  if (highest > maximum) { // maximum is -inf at first: then the factor is 0
    float factors[Lanes::width];
    store(factors, exp(broadcast(maximum - highest)));
    for_lanes(width, [&](int64_t index, int64_t count) {
      store_some(sums + index, load_some(sums + index, count) * broadcast(factors[0]), count);
    });
    total *= factors[0];
    maximum = highest;
  }
  Lanes added = broadcast(0.0f);
  const int64_t end = range.end;
  for (int64_t key = range.begin; key < end; key += Lanes::width) {
    const int64_t count = smaller<int64_t>(Lanes::width, end - key);
    Lanes weights = exp(load_some(scores + key, count) * broadcast(scale) - broadcast(maximum));
    if (count < Lanes::width) { // lanes that hold no key
      float padded[Lanes::width] = {};
      store_partial(padded, weights, count);
      weights = load(padded);
    }
    store_some(scores + key, weights, count);
    added = added + weights;
  }
  total += sum(added);
}

// sums[row] += weights[row, key] * values[key], for `count` rows and kValueVectors vectors of each value.
template <class T, int count>
inline void add_values(const AttentionShape& shape, const float* weights, const Span<T>& span, const Span<T>& next,
                       Range range, int64_t index, float* sums) {
  const int64_t num_next = next.size();
  Lanes totals[count][kValueVectors];
  for (int row = 0; row < count; row++)
    for (int64_t vector = 0; vector < kValueVectors; vector++)
      totals[row][vector] = load(sums + row * shape.padded_dim + index + vector * Lanes::width);
  for (int64_t key = range.begin; key < range.end; key++) {
    Lanes value[kValueVectors];
    for (int64_t vector = 0; vector < kValueVectors; vector++)
      value[vector] = load(span.values[key] + index + vector * Lanes::width);
    if (index == 0 && key < num_next) prefetch_row(next.values[key], shape.head_dim);
    for (int row = 0; row < count; row++) {
      const Lanes weight = broadcast(weights[row * kKeySpan + key]);
      for (int64_t vector = 0; vector < kValueVectors; vector++)
        totals[row][vector] = fma(weight, value[vector], totals[row][vector]);
    }
  }
  for (int row = 0; row < count; row++)
    for (int64_t vector = 0; vector < kValueVectors; vector++)
      store(sums + row * shape.padded_dim + index + vector * Lanes::width, totals[row][vector]);
}

template <class T, int count>
inline void add_value_tail(const AttentionShape& shape, const float* weights, const T* const* values, Range range,
                           int64_t index, float* sums) {
  for_lanes(shape.head_dim - index, [&](int64_t step, int64_t width) {
    for (int64_t key = range.begin; key < range.end; key++) {
      const Lanes value = load_some(values[key] + index + step, width);
      for (int row = 0; row < count; row++) {
        float* target = sums + row * shape.padded_dim + index + step;
        const Lanes weight = broadcast(weights[row * kKeySpan + key]);
        store_some(target, fma(weight, value, load_some(target, width)), width);
      }
    }
  });
}

// One span of keys for `count` rows of one or more tokens; `ranges` [count] are relative to the span.
template <class Dot, int count>
void attend_rows(const ShuteyeAttention& attention, const AttentionShape& shape, const AttentionScratch& scratch,
                 const Span<typename Dot::Weight>& span, const Span<typename Dot::Weight>& next, int64_t row,
                 const Range* ranges) {
  using T = typename Dot::Weight;
  float* scores = scratch.scores + row * kKeySpan;
  float* sums = scratch.sums + row * shape.padded_dim;
  Range all = ranges[0];
  for (int each = 1; each < count; each++) all = {smaller(all.begin, ranges[each].begin), larger(all.end, ranges[each].end)};
  if (all.begin >= all.end) return;
  const auto* query = static_cast<const typename Dot::X*>(scratch.query) + row * shape.padded_dim;
  score_rows<Dot, count>(shape, query, span, next, all, scores);
  for (int each = 0; each < count; each++) {
    float* own = scores + each * kKeySpan;
    const Range range = ranges[each];
    if (range.begin < range.end) {
      weigh_row(own, range, static_cast<float>(attention.scale), scratch.maxima[row + each], scratch.totals[row + each], sums + each * shape.padded_dim,
                shape.padded_dim);
    }
    for (int64_t key = all.begin; key < all.end; key++) // what others of the group see, but this row does not
      if (key < range.begin || key >= range.end) own[key] = 0.0f;
  }
  constexpr int64_t step = kValueVectors * Lanes::width;
  int64_t index = 0;
  for (; index + step <= shape.head_dim; index += step)
    add_values<T, count>(shape, scores, span, next, all, index, sums);
  if (index < shape.head_dim) add_value_tail<T, count>(shape, scores, span.values, all, index, sums);
}

template <class Dot>
void attend_span(const ShuteyeAttention& attention, const AttentionTask& task, const AttentionShape& shape,
                 const AttentionScratch& scratch, const Span<typename Dot::Weight>& span,
                 const Span<typename Dot::Weight>& next) {
  const Range positions = span.positions;
  const auto range_of = [&](int64_t row) {
    const Range seen = seen_by(attention, task, row / shape.group);
    return Range{larger(seen.begin, positions.begin) - positions.begin, smaller(seen.end, positions.end) - positions.begin};
  };
  int64_t row = 0;
  for (; row + kRowGroup <= shape.rows; row += kRowGroup) {
    const Range ranges[] = {range_of(row), range_of(row + 1), range_of(row + 2), range_of(row + 3)};
    attend_rows<Dot, kRowGroup>(attention, shape, scratch, span, next, row, ranges);
  }
  if (row + 3 == shape.rows) {
    const Range ranges[] = {range_of(row), range_of(row + 1), range_of(row + 2)};
    return attend_rows<Dot, 3>(attention, shape, scratch, span, next, row, ranges);
  }
  for (; row < shape.rows; row++) {
    const Range range = range_of(row);
    attend_rows<Dot, 1>(attention, shape, scratch, span, next, row, &range);
  }
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

// body(span, next) for all keys that the task sees, kKeySpan at a time; the last span has itself as the next.
template <class T, class Body>
void each_span(const ShuteyeAttention& attention, const AttentionTask& task, const Body& body) {
  const int64_t begin = seen_by(attention, task, 0).begin;
  const int64_t end = seen_by(attention, task, task.num_tokens - 1).end;
  const auto span_from = [&](int64_t first) { return Range{first, smaller(first + kKeySpan, end)}; };
  Span<T> next(attention, task, span_from(begin));
  for (int64_t first = begin; first < end; first += kKeySpan) {
    const Span<T> span = next;
    if (first + kKeySpan < end) next = Span<T>(attention, task, span_from(first + kKeySpan));
    body(span, next);
  }
}

template <class Dot>
void attend(const ShuteyeAttention& attention, const AttentionTask& task, const AttentionTask*, void* memory) {
  using T = typename Dot::Weight;
  const AttentionShape shape(attention, task);
  const AttentionScratch scratch(memory, shape);
  read_queries<Dot>(attention, task, shape, static_cast<typename Dot::X*>(scratch.query));
  memset(scratch.sums, 0, shape.rows * shape.padded_dim * sizeof(float));
  for (int64_t row = 0; row < shape.rows; row++) {
    scratch.maxima[row] = -__builtin_inff();
    scratch.totals[row] = 0.0f;
  }
  each_span<T>(attention, task, [&](const Span<T>& span, const Span<T>& next) {
    attend_span<Dot>(attention, task, shape, scratch, span, next);
  });
  for (int64_t row = 0; row < shape.rows; row++)
    finish_row<T>(attention, shape, task, row, scratch.sums + row * shape.padded_dim, scratch.maxima[row], scratch.totals[row]);
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
