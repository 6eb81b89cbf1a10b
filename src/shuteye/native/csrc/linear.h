// What all products have in common: a row of tokens as it is multiplied, and what becomes of sums. Knows no weights.
#pragma once
#include "elementwise.h"
#include "kernel_table.h"

namespace SHUTEYE_ISA {

using shuteye::Finish;
using shuteye::kTileRows;
using shuteye::Linear;
using shuteye::round_up;

template <class T>
const T* row_of(const Linear& linear, int64_t token) {
  const int64_t row = linear.rows ? linear.rows[token] : token;
  return static_cast<const T*>(linear.x) + row * linear.in_features;
}

template <class T, class X>
void copy_row(const Linear& linear, int64_t token, X* target, int64_t depth) {
  const T* source = row_of<T>(linear, token);
  if (linear.norm) {
    norm_row(source, static_cast<const T*>(linear.norm), linear.eps, target, linear.in_features);
  } else {
    for_lanes(linear.in_features, [&](int64_t index, int64_t count) {
      store_some(target + index, load_some(source + index, count), count);
    });
  }
  memset(target + linear.in_features, 0, (depth - linear.in_features) * sizeof(X));
}

// sums[token * stride + row].
struct Sums {
  const float* first;
  int64_t stride;
};

struct TokenRange {
  int64_t first;
  int64_t count;
};

// What is read of a tile: y = sums + bias, as T holds it.
template <class T>
struct TileReader {
  Sums sums;
  const T* bias; // of the tile's first row; or null

  Lanes exact(int64_t token, int64_t index, int64_t count) const {
    const Lanes product = load_some(sums.first + token * sums.stride + index, count);
    return bias ? product + load_some(bias + index, count) : product;
  }
  Lanes read(int64_t token, int64_t index, int64_t count) const { return rounded<T>(exact(token, index, count)); }
};

template <class T>
TileReader<T> tile_reader(const ShuteyeMatrix& matrix, Sums sums, int64_t first_row) {
  return {sums, matrix.bias ? static_cast<const T*>(matrix.bias) + first_row : nullptr};
}

template <class T, Finish finish>
inline void finish_as(const Linear& linear, Sums sums, Sums upper_sums, int64_t first_row, int64_t num_rows, TokenRange tokens) {
  const TileReader<T> tile = tile_reader<T>(linear.weight, sums, first_row);
  const TileReader<T> upper = tile_reader<T>(linear.upper, upper_sums, first_row);
  for (int64_t index = 0; index < tokens.count; index++) {
    const int64_t token = tokens.first + index;
    const int64_t offset = linear.packs_out ? shuteye::packed_offset(token, first_row, linear.out_features)
                                            : token * linear.out_stride + first_row;
    for_lanes(num_rows, [&](int64_t lane, int64_t count) {
      if constexpr (finish == Finish::store_part) {
        return store_some(static_cast<float*>(linear.out) + offset + lane, tile.exact(index, lane, count), count);
      }
      Lanes y = tile.read(index, lane, count);
      if constexpr (finish == Finish::store_float) {
        return store_some(static_cast<float*>(linear.out) + offset + lane, y, count);
      }
      if constexpr (finish == Finish::add) {
        const int64_t row = linear.rows ? linear.rows[token] : token;
        const T* residual = static_cast<const T*>(linear.residual) + row * linear.out_stride + first_row;
        y = load_some(residual + lane, count) + y;
      }
      if constexpr (finish == Finish::silu_mul) y = silu_mul<T>(y, upper.read(index, lane, count));
      store_some(static_cast<T*>(linear.out) + offset + lane, y, count);
    });
  }
}

template <Finish value>
struct FinishTag {
  static constexpr Finish finish = value;
};

// body(tag), with the way to finish as a constant: tag.finish.
template <class Body>
void with_finish(Finish finish, const Body& body) {
  switch (finish) {
    case Finish::store: return body(FinishTag<Finish::store>{});
    case Finish::store_float: return body(FinishTag<Finish::store_float>{});
    case Finish::store_part: return body(FinishTag<Finish::store_part>{});
    case Finish::add: return body(FinishTag<Finish::add>{});
    case Finish::silu_mul: return body(FinishTag<Finish::silu_mul>{});
  }
}

// Of rows [first_row, first_row + num_rows), whose sums are given; `upper` is used by silu_mul alone.
template <class T>
void finish_tile(const Linear& linear, Sums sums, Sums upper, int64_t first_row, int64_t num_rows, TokenRange tokens) {
  with_finish(linear.finish, [&](auto tag) {
    finish_as<T, decltype(tag)::finish>(linear, sums, upper, first_row, num_rows, tokens);
  });
}

} // namespace SHUTEYE_ISA
