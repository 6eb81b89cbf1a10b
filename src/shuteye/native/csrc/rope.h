// Per-head norm, rotary positions and the cache write of new keys and values. Knows nothing of threads.
#pragma once
#include "elementwise.h"
#include "kernel_table.h"
#include "kv_cache.h"

namespace SHUTEYE_ISA {

// C: what the cache holds. Keys are rounded to T before.
template <class T, class C>
inline void rope_head(const ShuteyeRope& rope, int64_t token, int64_t head) {
  const int64_t head_dim = rope.cache.head_dim, num_kv_heads = rope.cache.num_kv_heads;
  const int64_t num_all = rope.num_heads + 2 * num_kv_heads;
  T* own = static_cast<T*>(rope.qkv) + (token * num_all + head) * head_dim;
  if (head >= rope.num_heads + num_kv_heads) { // a value
    return write_head<T, C>(rope.cache, rope.layer, 1, rope.slots[token], head - rope.num_heads - num_kv_heads, own);
  }
  const bool is_query = head < rope.num_heads;
  const void* norm = is_query ? rope.query_norm : rope.key_norm;
  if (norm) norm_row(own, static_cast<const T*>(norm), static_cast<float>(rope.eps), own, head_dim);
  const int64_t angles = token * head_dim;
  rotate_head(own, static_cast<const T*>(rope.cos) + angles, static_cast<const T*>(rope.sin) + angles, own, head_dim);
  if (!is_query) write_head<T, C>(rope.cache, rope.layer, 0, rope.slots[token], head - rope.num_heads, own);
}

template <class T, class C>
void rope_heads(const ShuteyeRope& rope, int64_t first_head, int64_t end_head) {
  for (int64_t token = 0; token < rope.num_tokens; token++) {
    for (int64_t head = first_head; head < end_head; head++) rope_head<T, C>(rope, token, head);
  }
}

} // namespace SHUTEYE_ISA
