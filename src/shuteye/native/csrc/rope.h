// Per-head norm, rotary positions and the cache write of new keys and values. Knows nothing of threads.
#pragma once
#include "elementwise.h"
#include "kernel_table.h"

namespace SHUTEYE_ISA {

// Where a slot's keys (half 0) or values (half 1) of all KV heads stand: [num_kv_heads, head_dim].
template <class T>
inline T* cache_row(const ShuteyeCache& cache, int64_t layer, int64_t half, int64_t slot) {
  const int64_t block = slot / cache.block_size, offset = slot % cache.block_size;
  const int64_t row = ((block * cache.num_layers + layer) * 2 + half) * cache.block_size + offset;
  return static_cast<T*>(cache.base) + row * cache.num_kv_heads * cache.head_dim;
}

template <class T>
inline void rope_head(const ShuteyeRope& rope, int64_t token, int64_t head) {
  const int64_t head_dim = rope.cache.head_dim, num_kv_heads = rope.cache.num_kv_heads;
  const int64_t num_all = rope.num_heads + 2 * num_kv_heads;
  T* own = static_cast<T*>(rope.qkv) + (token * num_all + head) * head_dim;
  if (head >= rope.num_heads + num_kv_heads) { // a value
    T* target = cache_row<T>(rope.cache, rope.layer, 1, rope.slots[token]);
    memcpy(target + (head - rope.num_heads - num_kv_heads) * head_dim, own, head_dim * sizeof(T));
    return;
  }
  const bool is_query = head < rope.num_heads;
  const void* norm = is_query ? rope.query_norm : rope.key_norm;
  if (norm) norm_row(own, static_cast<const T*>(norm), static_cast<float>(rope.eps), own, head_dim);
  T* target = own;
  if (!is_query) {
    target = cache_row<T>(rope.cache, rope.layer, 0, rope.slots[token]) + (head - rope.num_heads) * head_dim;
  }
  const int64_t angles = token * head_dim;
  rotate_head(own, static_cast<const T*>(rope.cos) + angles, static_cast<const T*>(rope.sin) + angles, target,
              head_dim);
}

template <class T>
void rope_heads(const ShuteyeRope& rope, int64_t first_head, int64_t end_head) {
  for (int64_t token = 0; token < rope.num_tokens; token++) {
    for (int64_t head = first_head; head < end_head; head++) rope_head<T>(rope, token, head);
  }
}

} // namespace SHUTEYE_ISA
