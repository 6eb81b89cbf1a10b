// The online softmax (arXiv:2205.14135) down columns: a row of scores is a key, its 16 columns are rows of queries, so that
// nothing is ever summed across lanes. Weights come out two keys at a time, in bfloat16, as products of tiles want them.
// Knows nothing of tiles, tasks or the cache.
//
// A weight is 2^(exponent - reference), where exponents are scores times scale, to base 2. A column's reference is raised
// only when weights would reach 2, to kRoom above the highest exponent: what was summed before is then scaled by a power
// of two, exactly.
#pragma once
#include "attention.h"

namespace SHUTEYE_ISA {

constexpr int64_t kColumns = 16;
constexpr float kNoScore = -3e38f;      // below any score
constexpr float kNothingSeen = -1e30f; // below any exponent, and finite: so are differences of it
constexpr float kRoom = 7.0f;          // the heaviest weight is 2^-7 or more: far from where floats end

// 2^x with a relative error below 8e-5, for what is cut to bfloat16 afterwards; underflows to 0, any finite x.
// Minimax polynomial of degree 3 on [0, 1].
inline Lanes rough_exp2(Lanes x) {
  const Lanes r{_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF)};
  Lanes p = fma(broadcast(0.07802452f), r, broadcast(0.22606716f));
  p = fma(p, r, broadcast(0.69583354f));
  p = fma(p, r, broadcast(0.99992522f));
  return {_mm512_scalef_ps(p.v, x.v)};
}

// Weights of one key in the low, of the next in the high half of each lane. They are cut, not rounded: all of a row become
// lighter by about the same, which falls out because the totals are those of what was left.
inline __m512i pair_of(Lanes even, Lanes odd) {
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even.v), 16);
  return _mm512_mask_mov_epi16(_mm512_castps_si512(odd.v), 0x55555555u, low);
}

inline Lanes add_pair(Lanes totals, __m512i pair) {
  return {_mm512_dpbf16_ps(totals.v, (__m512bh)pair, (__m512bh)_mm512_set1_epi16(0x3f80))};
}

// True if any weight is 2 or more, of pairs that may have been or-ed together.
inline bool too_heavy(__m512i pairs) { return _mm512_test_epi32_mask(pairs, _mm512_set1_epi32(0x40004000)) != 0; }

// What 16 columns have seen so far.
struct Columns {
  Lanes references = broadcast(kNothingSeen);
  Lanes totals = broadcast(0.0f); // of weights

  // Makes room for exponents up to `highest`. True if there was none: then sums so far must be scaled by `factors`.
  bool raise(Lanes highest, Lanes& factors) {
    const Lanes seen = max(highest, broadcast(kNothingSeen));
    const __m512i weights = _mm512_castps_si512(rough_exp2(seen - references).v);
    const __mmask16 heavy = _mm512_test_epi32_mask(weights, _mm512_set1_epi32(0x40000000));
    if (!heavy) return false;
    const Lanes above{_mm512_roundscale_ps(seen.v, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC)};
    const Lanes raised{_mm512_mask_add_ps(references.v, heavy, above.v, broadcast(kRoom).v)};
    factors = {_mm512_scalef_ps(broadcast(1.0f).v, (references - raised).v)};
    totals = totals * factors;
    references = raised;
    return true;
  }
};

} // namespace SHUTEYE_ISA
