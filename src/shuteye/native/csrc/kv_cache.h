// Where the keys and values of a token lie in the cache, and how they get there. Knows nothing of attention.
//
// A block has, for each layer, keys and then values: numbers [block_size, num_kv_heads, head_dim], and after those of int8
// their scales, float [num_kv_heads, block_size]. Of int8, a number times its scale is the key or value.
#pragma once
#include "kv_elements.h"
#include "types.h"

namespace SHUTEYE_ISA {

// Bytes of the keys, or of the values, of one layer in one block.
template <class C>
inline int64_t half_bytes(const ShuteyeCache& cache) {
  const int64_t head_bytes = cache.head_dim * static_cast<int64_t>(sizeof(C)) + (kHasScales<C> ? sizeof(float) : 0);
  return cache.block_size * cache.num_kv_heads * head_bytes;
}

// The keys (half 0) or values (half 1) of a block: [block_size, num_kv_heads, head_dim].
template <class C>
inline C* cache_block(const ShuteyeCache& cache, int64_t layer, int64_t half, int64_t block) {
  const int64_t index = (block * cache.num_layers + layer) * 2 + half;
  return reinterpret_cast<C*>(static_cast<char*>(cache.base) + index * half_bytes<C>(cache));
}

// Of int8, the scales that belong to what `cache_block` gave: [num_kv_heads, block_size].
inline float* cache_scales(const ShuteyeCache& cache, i8* block) {
  return reinterpret_cast<float*>(block + cache.block_size * cache.num_kv_heads * cache.head_dim);
}

// Those of all KV heads in a slot: [num_kv_heads, head_dim].
template <class C>
inline C* cache_row(const ShuteyeCache& cache, int64_t layer, int64_t half, int64_t slot) {
  const int64_t block = slot / cache.block_size, offset = slot % cache.block_size;
  return cache_block<C>(cache, layer, half, block) + offset * cache.num_kv_heads * cache.head_dim;
}

template <class T, class C>
inline void write_numbers(const T* numbers, C* target, int64_t count) {
  for_lanes(count, [&](int64_t index, int64_t some) { store_some(target + index, load_some(numbers + index, some), some); });
}

// Numbers of int8, whose scale is given: the largest magnitude over 127. One that is not finite becomes NaN; one that is
// too small to divide by becomes 0.
template <class T>
inline float quantize(const T* numbers, i8* target, int64_t count) {
  Lanes highest = broadcast(0.0f), wrong = broadcast(0.0f);
  for_lanes(count, [&](int64_t index, int64_t some) {
    const Lanes own = load_some(numbers + index, some);
    highest = max(highest, max(own, broadcast(0.0f) - own));
    wrong = fma(own, broadcast(0.0f), wrong); // NaN of what is not finite
  });
  const float magnitude = largest(highest);
  const bool is_finite = sum(wrong) == 0.0f;
  if (!is_finite || magnitude < 1e-30f) {
    memset(target, 0, count);
    return is_finite ? 0.0f : __builtin_nanf("");
  }
  const Lanes factor = broadcast(127.0f / magnitude);
  for_lanes(count, [&](int64_t index, int64_t some) {
    store_some(target + index, load_some(numbers + index, some) * factor, some);
  });
  return magnitude / 127.0f;
}

// One KV head's key or value of a slot.
template <class T, class C>
inline void write_head(const ShuteyeCache& cache, int64_t layer, int64_t half, int64_t slot, int64_t head, const T* numbers) {
  const int64_t block = slot / cache.block_size, offset = slot % cache.block_size;
  C* base = cache_block<C>(cache, layer, half, block);
  C* target = base + (offset * cache.num_kv_heads + head) * cache.head_dim;
  if constexpr (kHasScales<C>) {
    cache_scales(cache, base)[head * cache.block_size + offset] = quantize(numbers, target, cache.head_dim);
  } else {
    write_numbers(numbers, target, cache.head_dim);
  }
}

} // namespace SHUTEYE_ISA
