// How queries meet keys and weights meet values: what is read of the cache at a time, in which form it is multiplied.
// Knows nothing of tasks, spans or the softmax.
//
// Products are of units of four bytes, one of a row of queries (or of weights) spread over all lanes: a float, or a pair
// of bfloat16 that are multiplied and added at once. A panel is two vectors: of 2 * Lanes::width dimensions or keys.
#pragma once
#include "constants.h"
#include "kv_cache.h"
#include "transpose.h"

namespace SHUTEYE_ISA {

constexpr int64_t kPanel = 2 * Lanes::width;

// The sums over the lanes of four vectors.
inline void sums_of_four(const Lanes* lanes, float* sums) {
#if defined(SHUTEYE_LANES_AVX512)
  const __m512 left = _mm512_add_ps(_mm512_unpacklo_ps(lanes[0].v, lanes[1].v), _mm512_unpackhi_ps(lanes[0].v, lanes[1].v));
  const __m512 right = _mm512_add_ps(_mm512_unpacklo_ps(lanes[2].v, lanes[3].v), _mm512_unpackhi_ps(lanes[2].v, lanes[3].v));
  const __m512 quarters = _mm512_add_ps(_mm512_shuffle_ps(left, right, 0x44), _mm512_shuffle_ps(left, right, 0xee));
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
#elif defined(SHUTEYE_LANES_AVX2)
  const __m256 left = _mm256_add_ps(_mm256_unpacklo_ps(lanes[0].v, lanes[1].v), _mm256_unpackhi_ps(lanes[0].v, lanes[1].v));
  const __m256 right = _mm256_add_ps(_mm256_unpacklo_ps(lanes[2].v, lanes[3].v), _mm256_unpackhi_ps(lanes[2].v, lanes[3].v));
  const __m256 halves = _mm256_add_ps(_mm256_shuffle_ps(left, right, 0x44), _mm256_shuffle_ps(left, right, 0xee));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
#else
  for (int index = 0; index < 4; index++) sums[index] = sum(lanes[index]);
#endif
}

// 2^x with a relative error below 3e-6, for what meets bfloat16; 0 below -126, x < 128.
inline Lanes short_exp2(Lanes x) {
  const Lanes capped = max(x, broadcast(-126.0f));
  const Lanes n = nearest_integer(capped), r = capped - n;
  Lanes p = fma(broadcast(0.00957010197f), r, broadcast(0.0559178608f));
  p = fma(p, r, broadcast(0.240247448f));
  p = fma(p, r, broadcast(0.693121815f));
  p = fma(p, r, broadcast(0.999999261f));
  return zero_below(p * power_of_two(n), x, -126.0f);
}

template <class C>
inline Lanes exp2_for(Lanes x, C) {
  return short_exp2(x);
}
inline Lanes exp2_for(Lanes x, float) { return exp(x * broadcast(0.69314718f)); }

// A panel of elements where they lie in the cache, and the two vectors of floats that they become: in an order of their
// own, which `order` undoes and `disorder` does.
template <class T>
struct Panel {
  const T* place;

  static Panel read(const T* place) { return {place}; }
  Lanes part(int index) const { return load(place + index * Lanes::width); }
  static void order(Lanes (&)[2]) {}
  static void disorder(Lanes (&)[2]) {}
};

#if defined(SHUTEYE_LANES_AVX2)
template <>
struct Panel<bf16> { // the even elements, then the odd ones: nothing is shuffled to widen them
  const bf16* place;

  static Panel read(const bf16* place) { return {place}; }
  // Read once for each part, and the mask each time: what is kept in a register drives a sum out of one.
  Lanes part(int index) const {
    alignas(32) static constexpr uint32_t kOdd[8] = {0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u,
                                                     0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u};
    __m256i bits;
    if (index) {
      asm volatile("vmovdqa %1, %0" : "=x"(bits) : "m"(kOdd));
      bits = _mm256_and_si256(bits, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(place)));
    } else {
      const bf16* own = place;
      asm volatile("" : "+r"(own));
      bits = _mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(own)), 16);
    }
    return {_mm256_castsi256_ps(bits)};
  }
  static void order(Lanes (&two)[2]) {
    const __m256 low = _mm256_unpacklo_ps(two[0].v, two[1].v), high = _mm256_unpackhi_ps(two[0].v, two[1].v);
    two[0].v = _mm256_permute2f128_ps(low, high, 0x20);
    two[1].v = _mm256_permute2f128_ps(low, high, 0x31);
  }
  static void disorder(Lanes (&two)[2]) {
    const __m256 even = _mm256_shuffle_ps(two[0].v, two[1].v, 0x88), odd = _mm256_shuffle_ps(two[0].v, two[1].v, 0xdd);
    two[0].v = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xd8));
    two[1].v = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(odd), 0xd8));
  }
};
#endif

// The first `count` elements of a panel; the others are 0. Reads nothing beyond them; valid until the next one.
template <class P, class T>
class PanelEnd {
 public:
  explicit PanelEnd(int64_t count) : count_(count) { memset(padded_, 0, sizeof padded_); }
  P read(const T* place) {
    memcpy(padded_, place, smaller(count_, kPanel) * sizeof(T));
    return P::read(padded_);
  }

 private:
  T padded_[kPanel];
  const int64_t count_;
};

// Queries of type T and a cache of elements C, both widened to float.
template <class T, class C = T>
struct FloatArithmetic {
  using Query = T;
  using Element = C;
  using Unit = float;
  using Vector = Lanes;
  using Sum = Lanes;
  using Weights = FloatArithmetic;
  using Read = Panel<C>;
  static constexpr int unit_size = 1;         // keys, or dimensions, in a unit
  static constexpr int key_parts = 2;         // vectors that a panel of a key's dimensions becomes

  static Vector key_part(const Read& panel, int part) { return panel.part(part); }
  // Of a panel of the values of a unit's keys.
  static Vector value_part(const Read* keys, int part) { return keys[0].part(part); }
  static void order(Lanes (&two)[2]) { Read::order(two); }
  static Lanes multiply_add(Vector left, Vector right, Lanes sum) { return fma(left, right, sum); }
  static void add_product(Vector left, Vector right, Lanes& sum) { SHUTEYE_ISA::add_product(left, right, sum); }
  static Vector spread(const Unit* unit) { return broadcast(*unit); }
  static Vector load_units(const Unit* units) { return load(units); }
  static void store_units(Unit* units, Vector vector) { store(units, vector); }

  static Sum nothing() { return broadcast(0.0f); }
  // Sums of weighted values that go on, and are kept; `factor`: of their weights as units.
  static Sum resumed(const float* sums) { return load(sums); }
  static void keep(float* sums, Sum sum, float) { store(sums, sum); }

  // A query as units, and as it meets keys that are read panel by panel; padded with zeros to whole panels. Gives what
  // scores must be multiplied by.
  static float read_query(const T* source, int64_t head_dim, Unit* query, bool by_panels) {
    for (int64_t index = 0; index < head_dim; index += kPanel) {
      PanelEnd<Panel<T>, T> end(head_dim - index);
      const Panel<T> panel = end.read(source + index);
      Lanes two[2] = {panel.part(0), panel.part(1)};
      Panel<T>::order(two);
      if (by_panels) Read::disorder(two);
      store(query + index, two[0]);
      store(query + index + Lanes::width, two[1]);
    }
    return 1.0f;
  }

  // units[dimension * kPanel + key] of up to kPanel keys; those that do not exist are 0.
  static void pack_keys(const C* const* keys, int64_t num_keys, int64_t head_dim, Unit* units) {
    for (int64_t index = 0; index < head_dim; index += Lanes::width) {
      const int64_t count = smaller<int64_t>(Lanes::width, head_dim - index);
      for (int64_t first = 0; first < kPanel; first += Lanes::width) {
        Lanes rows[Lanes::width];
        for (int64_t key = 0; key < Lanes::width; key++)
          rows[key] = first + key < num_keys ? load_some(keys[first + key] + index, count) : broadcast(0.0f);
        transpose(rows);
        for (int64_t each = 0; each < count; each++) store(units + (index + each) * kPanel + first, rows[each]);
      }
    }
  }

  // Weights of a row as units; gives their sum.
  static Lanes to_units(Lanes weights, int64_t key, Unit* units) {
    store(units + key, weights);
    return weights;
  }

  // Weights times the scales of their values as units, whole vectors; gives what those must be multiplied by.
  static float scale_weights(const float* weights, const float* scales, int64_t count, Unit* units) {
    for (int64_t key = 0; key < count; key += Lanes::width) store(units + key, load(weights + key) * load(scales + key));
    return 1.0f;
  }
};

#if defined(SHUTEYE_LANES_AVX512)
// Pairs of bfloat16, of neighbouring dimensions or keys: nothing is widened.
struct PairArithmetic {
  using Query = bf16;
  using Element = bf16;
  using Unit = uint32_t;
  using Vector = __m512bh;
  using Sum = Lanes;
  static constexpr int unit_size = 2;
  static constexpr int key_parts = 1;

  struct Read {
    __m512i raw = _mm512_setzero_si512();
    static Read read(const bf16* source) { return {_mm512_loadu_si512(source)}; }
  };

  static Vector key_part(const Read& panel, int) { return (__m512bh)panel.raw; }
  static Vector value_part(const Read* keys, int part) { // the lower or the upper fours of each eight dimensions
    return (__m512bh)(part ? _mm512_unpackhi_epi16(keys[0].raw, keys[1].raw)
                           : _mm512_unpacklo_epi16(keys[0].raw, keys[1].raw));
  }
  static void order(Lanes (&two)[2]) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    const __m512 low = two[0].v, high = two[1].v;
    two[0].v = _mm512_permutex2var_ps(low, first, high);
    two[1].v = _mm512_permutex2var_ps(low, second, high);
  }
  static Lanes multiply_add(Vector left, Vector right, Lanes sum) { return {_mm512_dpbf16_ps(sum.v, left, right)}; }
  static void add_product(Vector left, Vector right, Lanes& sum) { sum = multiply_add(left, right, sum); }
  static Vector spread(const Unit* unit) { return (__m512bh)_mm512_set1_epi32(static_cast<int>(*unit)); }
  static Vector load_units(const Unit* units) { return (__m512bh)_mm512_loadu_si512(units); }
  static void store_units(Unit* units, Vector vector) { _mm512_storeu_si512(units, (__m512i)vector); }

  static Sum nothing() { return broadcast(0.0f); }
  static Sum resumed(const float* sums) { return load(sums); }
  static void keep(float* sums, Sum sum, float) { store(sums, sum); }

  static float read_query(const bf16* source, int64_t head_dim, Unit* query, bool) {
    for (int64_t index = 0; index < head_dim; index += kPanel)
      _mm512_storeu_si512(query + index / 2, PanelEnd<Read, bf16>(head_dim - index).read(source + index).raw);
    return 1.0f;
  }

  static void pack_keys(const bf16* const* keys, int64_t num_keys, int64_t head_dim, Unit* units) {
    for (int64_t index = 0; index < head_dim; index += kPanel) {
      const int64_t count = smaller<int64_t>(Lanes::width, (head_dim - index + 1) / 2);
      PanelEnd<Read, bf16> end(head_dim - index);
      for (int64_t first = 0; first < kPanel; first += Lanes::width) {
        Lanes rows[Lanes::width];
        for (int64_t key = 0; key < Lanes::width; key++) {
          const bool exists = first + key < num_keys;
          rows[key].v = exists ? _mm512_castsi512_ps(end.read(keys[first + key] + index).raw)
                               : _mm512_setzero_ps();
        }
        transpose(rows);
        for (int64_t each = 0; each < count; each++)
          _mm512_storeu_ps(units + (index / 2 + each) * kPanel + first, rows[each].v);
      }
    }
  }

  static Lanes to_units(Lanes weights, int64_t key, Unit* units) { // the sum is of what they are rounded to
    auto* places = reinterpret_cast<bf16*>(units) + key;
    store(places, weights);
    return round_lanes(weights, bf16{});
  }
};
#endif

} // namespace SHUTEYE_ISA
