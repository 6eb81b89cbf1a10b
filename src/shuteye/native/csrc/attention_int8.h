// How queries meet keys of int8, and weights values: as products of whole numbers, so that nothing is widened to float.
// A query is made of 16-bit numbers with one scale, as are the weights of a span; products of pairs, of neighbouring
// dimensions or keys, are added in 32 bits, exactly. Knows nothing of tasks, spans or the softmax.
#pragma once
#include "attention_arithmetic.h"

namespace SHUTEYE_ISA {

#if defined(SHUTEYE_LANES_AVX512)
struct Words { // of 16 bits, in pairs; or their sums of 32 bits
  __m512i v;
};
struct HalfVector { // of 8 bits
  __m256i v;
};
inline HalfVector load_bytes(const i8* source) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source))}; }
inline Words widened(HalfVector bytes) { return {_mm512_cvtepi8_epi16(bytes.v)}; }
inline HalfVector lower_pairs(HalfVector even, HalfVector odd) { return {_mm256_unpacklo_epi8(even.v, odd.v)}; }
inline HalfVector upper_pairs(HalfVector even, HalfVector odd) { return {_mm256_unpackhi_epi8(even.v, odd.v)}; }
inline Words no_words() { return {_mm512_setzero_si512()}; }
inline Words add_pairs(Words left, Words right, Words sum) {
  return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(left.v, right.v))};
}
inline Lanes to_lanes(Words sums) { return {_mm512_cvtepi32_ps(sums.v)}; }
inline Words spread_pair(const uint32_t* pair) { return {_mm512_set1_epi32(static_cast<int>(*pair))}; }
inline Words load_pairs(const uint32_t* pairs) { return {_mm512_loadu_si512(pairs)}; }
inline void store_words(int16_t* target, Lanes lanes) { // within int16; as many as lanes
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(lanes.v)));
}
inline void order_pairs(Lanes (&two)[2]) { // what lower_pairs and upper_pairs of 32 values left in eights
  const __m512 lower = two[0].v, upper = two[1].v;
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  two[0].v = _mm512_permutex2var_ps(lower, first, upper);
  two[1].v = _mm512_permutex2var_ps(lower, _mm512_add_epi32(first, _mm512_set1_epi32(8)), upper);
}
inline void sums_of_four(const Words* words, float* sums) {
  Lanes lanes[4]; // exact, as sums of lanes are: below 2^24 or rounded once
  for (int index = 0; index < 4; index++) lanes[index] = to_lanes(words[index]);
  sums_of_four(lanes, sums);
}
#elif defined(SHUTEYE_LANES_AVX2)
struct Words { // of 16 bits, in pairs; or their sums of 32 bits
  __m256i v;
};
struct HalfVector { // of 8 bits
  __m128i v;
};
inline HalfVector load_bytes(const i8* source) { return {_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))}; }
inline Words widened(HalfVector bytes) { return {_mm256_cvtepi8_epi16(bytes.v)}; }
inline HalfVector lower_pairs(HalfVector even, HalfVector odd) { return {_mm_unpacklo_epi8(even.v, odd.v)}; }
inline HalfVector upper_pairs(HalfVector even, HalfVector odd) { return {_mm_unpackhi_epi8(even.v, odd.v)}; }
inline Words no_words() { return {_mm256_setzero_si256()}; }
inline Words add_pairs(Words left, Words right, Words sum) {
  return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(left.v, right.v))};
}
inline Lanes to_lanes(Words sums) { return {_mm256_cvtepi32_ps(sums.v)}; }
inline Words spread_pair(const uint32_t* pair) { return {_mm256_set1_epi32(static_cast<int>(*pair))}; }
inline Words load_pairs(const uint32_t* pairs) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs))}; }
inline void store_words(int16_t* target, Lanes lanes) { // within int16; as many as lanes
  const __m256i ints = _mm256_cvtps_epi32(lanes.v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), words);
}
inline void order_pairs(Lanes (&)[2]) {}
inline void sums_of_four(const Words* words, float* sums) {
  const __m256i left = _mm256_hadd_epi32(words[0].v, words[1].v), right = _mm256_hadd_epi32(words[2].v, words[3].v);
  const __m256i halves = _mm256_hadd_epi32(left, right);
  const __m128i whole = _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  _mm_storeu_ps(sums, _mm_cvtepi32_ps(whole));
}
#endif

#if defined(SHUTEYE_LANES_AVX512) || defined(SHUTEYE_LANES_AVX2)
// Queries of type T. 32 bits hold 127 * 32767 times 512 dimensions, or 16 keys.
template <class T>
struct Int8Arithmetic {
  using Query = T;
  using Element = i8;
  using Unit = uint32_t; // a pair
  using Vector = Words;
  using Sum = Words;
  using Weights = FloatArithmetic<T, i8>;
  static constexpr int unit_size = 2;
  static constexpr int key_parts = 1;
  static constexpr float kLargest = 32767.0f;

  struct Read {
    HalfVector raw{};
    static Read read(const i8* source) { return {load_bytes(source)}; }
  };

  static Vector key_part(const Read& panel, int) { return widened(panel.raw); }
  static Vector value_part(const Read* keys, int part) {
    return widened(part ? upper_pairs(keys[0].raw, keys[1].raw) : lower_pairs(keys[0].raw, keys[1].raw));
  }
  static void order(Lanes (&two)[2]) { order_pairs(two); }
  static Sum multiply_add(Vector left, Vector right, Sum sum) { return add_pairs(left, right, sum); }
  static void add_product(Vector left, Vector right, Sum& sum) { sum = add_pairs(left, right, sum); }
  static Vector spread(const Unit* unit) { return spread_pair(unit); }
  static Vector load_units(const Unit* units) { return load_pairs(units); }
  static Sum nothing() { return no_words(); }
  static Sum resumed(const float*) { return no_words(); }
  static void keep(float* sums, Sum sum, float factor) { store(sums, fma(to_lanes(sum), broadcast(factor), load(sums))); }

  static float read_query(const T* source, int64_t head_dim, Unit* query, bool) {
    float numbers[kPanel];
    Lanes highest = broadcast(0.0f), wrong = broadcast(0.0f);
    for_lanes(head_dim, [&](int64_t index, int64_t count) {
      const Lanes own = load_some(source + index, count);
      highest = max(highest, max(own, broadcast(0.0f) - own));
      wrong = fma(own, broadcast(0.0f), wrong);
    });
    const float magnitude = largest(highest), error = sum(wrong);
    const Lanes factor = broadcast(magnitude > 1e-30f && error == 0.0f ? kLargest / magnitude : 0.0f);
    for (int64_t index = 0; index < head_dim; index += kPanel) {
      memset(numbers, 0, sizeof numbers);
      for_lanes(smaller(kPanel, head_dim - index), [&](int64_t each, int64_t count) {
        store_some(numbers + each, load_some(source + index + each, count), count);
      });
      auto* words = reinterpret_cast<int16_t*>(query) + index;
      for (int64_t part = 0; part < kPanel; part += Lanes::width) {
        const Lanes own = error == 0.0f ? load(numbers + part) * factor : broadcast(0.0f);
        store_words(words + part, own);
      }
    }
    return magnitude * (1.0f / kLargest) + error; // NaN of a query that is not finite
  }

  static float scale_weights(float* weights, const float* scales, int64_t count, Unit* units) {
    Lanes highest = broadcast(0.0f), wrong = broadcast(0.0f);
    for (int64_t key = 0; key < count; key += Lanes::width) {
      const Lanes own = load(weights + key) * load(scales + key);
      store(weights + key, own);
      highest = max(highest, own);
      wrong = fma(own, broadcast(0.0f), wrong);
    }
    const float magnitude = largest(highest), error = sum(wrong);
    const Lanes factor = broadcast(magnitude > 1e-30f && error == 0.0f ? kLargest / magnitude : 0.0f);
    for (int64_t key = 0; key < count; key += Lanes::width) {
      const Lanes own = error == 0.0f ? load(weights + key) * factor : broadcast(0.0f);
      store_words(reinterpret_cast<int16_t*>(units) + key, own);
    }
    return magnitude * (1.0f / kLargest) + error; // NaN of a scale that is
  }
};
#endif

} // namespace SHUTEYE_ISA
