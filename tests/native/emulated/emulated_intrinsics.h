// The AVX-512 and AMX instructions that csrc/ uses, as loops over their lanes: for tests, on any x86-64 with AVX2, FMA and F16C.
// What each does is in Intel's Software Developer's Manual (volume 2) and, of tiles, in its Instruction Set Extensions
// reference; where results may differ between processors (rcp14), any that the manual allows.
//
// Included by csrc/intrinsics.h. Another instruction needs its name in the list, and its loop below.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#undef _mm512_setzero_ps
#define _mm512_setzero_ps emulated_mm512_setzero_ps
#undef _mm512_setzero_si512
#define _mm512_setzero_si512 emulated_mm512_setzero_si512
#undef _mm512_set1_ps
#define _mm512_set1_ps emulated_mm512_set1_ps
#undef _mm512_set1_epi8
#define _mm512_set1_epi8 emulated_mm512_set1_epi8
#undef _mm512_set1_epi16
#define _mm512_set1_epi16 emulated_mm512_set1_epi16
#undef _mm512_set1_epi32
#define _mm512_set1_epi32 emulated_mm512_set1_epi32
#undef _mm512_setr_epi32
#define _mm512_setr_epi32 emulated_mm512_setr_epi32
#undef _mm512_maskz_set1_epi8
#define _mm512_maskz_set1_epi8 emulated_mm512_maskz_set1_epi8
#undef _mm512_broadcast_i32x4
#define _mm512_broadcast_i32x4 emulated_mm512_broadcast_i32x4
#undef _mm512_load_si512
#define _mm512_load_si512 emulated_mm512_load_si512
#undef _mm512_loadu_si512
#define _mm512_loadu_si512 emulated_mm512_loadu_si512
#undef _mm512_loadu_ps
#define _mm512_loadu_ps emulated_mm512_loadu_ps
#undef _mm512_load_ps
#define _mm512_load_ps emulated_mm512_load_ps
#undef _mm512_maskz_loadu_epi16
#define _mm512_maskz_loadu_epi16 emulated_mm512_maskz_loadu_epi16
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps emulated_mm512_maskz_loadu_ps
#undef _mm512_maskz_loadu_epi8
#define _mm512_maskz_loadu_epi8 emulated_mm512_maskz_loadu_epi8
#undef _mm512_storeu_si512
#define _mm512_storeu_si512 emulated_mm512_storeu_si512
#undef _mm512_storeu_ps
#define _mm512_storeu_ps emulated_mm512_storeu_ps
#undef _mm512_store_ps
#define _mm512_store_ps emulated_mm512_store_ps
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps emulated_mm512_mask_storeu_ps
#undef _mm512_mask_storeu_epi16
#define _mm512_mask_storeu_epi16 emulated_mm512_mask_storeu_epi16
#undef _mm512_castps_pd
#define _mm512_castps_pd emulated_mm512_castps_pd
#undef _mm512_castpd_ps
#define _mm512_castpd_ps emulated_mm512_castpd_ps
#undef _mm512_castps_si512
#define _mm512_castps_si512 emulated_mm512_castps_si512
#undef _mm512_castsi512_ps
#define _mm512_castsi512_ps emulated_mm512_castsi512_ps
#undef _mm512_castps512_ps256
#define _mm512_castps512_ps256 emulated_mm512_castps512_ps256
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps emulated_mm512_extractf32x8_ps
#undef _mm512_castsi512_si256
#define _mm512_castsi512_si256 emulated_mm512_castsi512_si256
#undef _mm512_extracti64x4_epi64
#define _mm512_extracti64x4_epi64 emulated_mm512_extracti64x4_epi64
#undef _mm512_add_ps
#define _mm512_add_ps emulated_mm512_add_ps
#undef _mm512_sub_ps
#define _mm512_sub_ps emulated_mm512_sub_ps
#undef _mm512_mul_ps
#define _mm512_mul_ps emulated_mm512_mul_ps
#undef _mm512_div_ps
#define _mm512_div_ps emulated_mm512_div_ps
#undef _mm512_max_ps
#define _mm512_max_ps emulated_mm512_max_ps
#undef _mm512_min_ps
#define _mm512_min_ps emulated_mm512_min_ps
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps emulated_mm512_fmadd_ps
#undef _mm512_fnmadd_ps
#define _mm512_fnmadd_ps emulated_mm512_fnmadd_ps
#undef _mm512_mask_add_ps
#define _mm512_mask_add_ps emulated_mm512_mask_add_ps
#undef _mm512_mask_max_ps
#define _mm512_mask_max_ps emulated_mm512_mask_max_ps
#undef _mm512_rcp14_ps
#define _mm512_rcp14_ps emulated_mm512_rcp14_ps
#undef _mm512_reduce_add_ps
#define _mm512_reduce_add_ps emulated_mm512_reduce_add_ps
#undef _mm512_reduce_max_ps
#define _mm512_reduce_max_ps emulated_mm512_reduce_max_ps
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps emulated_mm512_roundscale_ps
#undef _mm512_reduce_ps
#define _mm512_reduce_ps emulated_mm512_reduce_ps
#undef _mm512_scalef_ps
#define _mm512_scalef_ps emulated_mm512_scalef_ps
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask emulated_mm512_cmp_ps_mask
#undef _mm512_maskz_mov_ps
#define _mm512_maskz_mov_ps emulated_mm512_maskz_mov_ps
#undef _mm512_add_epi8
#define _mm512_add_epi8 emulated_mm512_add_epi8
#undef _mm512_add_epi32
#define _mm512_add_epi32 emulated_mm512_add_epi32
#undef _mm512_sub_epi32
#define _mm512_sub_epi32 emulated_mm512_sub_epi32
#undef _mm512_mullo_epi32
#define _mm512_mullo_epi32 emulated_mm512_mullo_epi32
#undef _mm512_madd_epi16
#define _mm512_madd_epi16 emulated_mm512_madd_epi16
#undef _mm512_and_si512
#define _mm512_and_si512 emulated_mm512_and_si512
#undef _mm512_or_si512
#define _mm512_or_si512 emulated_mm512_or_si512
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 emulated_mm512_slli_epi32
#undef _mm512_srli_epi32
#define _mm512_srli_epi32 emulated_mm512_srli_epi32
#undef _mm512_slli_epi16
#define _mm512_slli_epi16 emulated_mm512_slli_epi16
#undef _mm512_srli_epi16
#define _mm512_srli_epi16 emulated_mm512_srli_epi16
#undef _mm512_cmple_epi32_mask
#define _mm512_cmple_epi32_mask emulated_mm512_cmple_epi32_mask
#undef _mm512_cmpge_epi32_mask
#define _mm512_cmpge_epi32_mask emulated_mm512_cmpge_epi32_mask
#undef _mm512_mask_cmpgt_epi32_mask
#define _mm512_mask_cmpgt_epi32_mask emulated_mm512_mask_cmpgt_epi32_mask
#undef _mm512_test_epi32_mask
#define _mm512_test_epi32_mask emulated_mm512_test_epi32_mask
#undef _mm512_mask_mov_epi16
#define _mm512_mask_mov_epi16 emulated_mm512_mask_mov_epi16
#undef _mm512_mask_blend_epi16
#define _mm512_mask_blend_epi16 emulated_mm512_mask_blend_epi16
#undef _mm512_unpacklo_epi16
#define _mm512_unpacklo_epi16 emulated_mm512_unpacklo_epi16
#undef _mm512_unpackhi_epi16
#define _mm512_unpackhi_epi16 emulated_mm512_unpackhi_epi16
#undef _mm512_unpacklo_epi32
#define _mm512_unpacklo_epi32 emulated_mm512_unpacklo_epi32
#undef _mm512_unpackhi_epi32
#define _mm512_unpackhi_epi32 emulated_mm512_unpackhi_epi32
#undef _mm512_unpacklo_epi64
#define _mm512_unpacklo_epi64 emulated_mm512_unpacklo_epi64
#undef _mm512_unpackhi_epi64
#define _mm512_unpackhi_epi64 emulated_mm512_unpackhi_epi64
#undef _mm512_unpacklo_ps
#define _mm512_unpacklo_ps emulated_mm512_unpacklo_ps
#undef _mm512_unpackhi_ps
#define _mm512_unpackhi_ps emulated_mm512_unpackhi_ps
#undef _mm512_unpacklo_pd
#define _mm512_unpacklo_pd emulated_mm512_unpacklo_pd
#undef _mm512_unpackhi_pd
#define _mm512_unpackhi_pd emulated_mm512_unpackhi_pd
#undef _mm512_shuffle_ps
#define _mm512_shuffle_ps emulated_mm512_shuffle_ps
#undef _mm512_shuffle_i32x4
#define _mm512_shuffle_i32x4 emulated_mm512_shuffle_i32x4
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4 emulated_mm512_shuffle_f32x4
#undef _mm512_shuffle_epi8
#define _mm512_shuffle_epi8 emulated_mm512_shuffle_epi8
#undef _mm512_permutex2var_ps
#define _mm512_permutex2var_ps emulated_mm512_permutex2var_ps
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 emulated_mm512_cvtepu16_epi32
#undef _mm512_cvtepi8_epi32
#define _mm512_cvtepi8_epi32 emulated_mm512_cvtepi8_epi32
#undef _mm512_cvtepi8_epi16
#define _mm512_cvtepi8_epi16 emulated_mm512_cvtepi8_epi16
#undef _mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi32 emulated_mm512_cvtepu8_epi32
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps emulated_mm512_cvtepi32_ps
#undef _mm512_cvtps_epi32
#define _mm512_cvtps_epi32 emulated_mm512_cvtps_epi32
#undef _mm512_cvtsepi32_epi8
#define _mm512_cvtsepi32_epi8 emulated_mm512_cvtsepi32_epi8
#undef _mm512_cvtsepi32_epi16
#define _mm512_cvtsepi32_epi16 emulated_mm512_cvtsepi32_epi16
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps emulated_mm512_cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph emulated_mm512_cvtps_ph
#undef _mm512_cvtneps_pbh
#define _mm512_cvtneps_pbh emulated_mm512_cvtneps_pbh
#undef _mm512_cvtne2ps_pbh
#define _mm512_cvtne2ps_pbh emulated_mm512_cvtne2ps_pbh
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps emulated_mm512_dpbf16_ps
#undef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_avx_epi32 emulated_mm256_dpbusd_avx_epi32
#undef _mm512_dpbusd_epi32
#define _mm512_dpbusd_epi32 emulated_mm512_dpbusd_epi32
#undef _tile_loadconfig
#define _tile_loadconfig emulated_tile_loadconfig
#undef _tile_release
#define _tile_release emulated_tile_release
#undef _tile_zero
#define _tile_zero emulated_tile_zero
#undef _tile_loadd
#define _tile_loadd emulated_tile_loadd
#undef _tile_stored
#define _tile_stored emulated_tile_stored
#undef _tile_dpbf16ps
#define _tile_dpbf16ps emulated_tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_dpbssd emulated_tile_dpbssd

namespace {

// Functions are inline in an unnamed namespace: every translation unit has its own.
#define SHUTEYE_EACH(result_type, lane_type, count, expression) \
  lane_type result[count];                                      \
  for (int i = 0; i < count; i++) result[i] = (expression);     \
  return lanes_of<result_type>(result)

template <class Vector, class Lane>
inline Vector lanes_of(const Lane* lanes) {
  Vector vector;
  memcpy(&vector, lanes, sizeof vector);
  return vector;
}

template <class Lane, class Vector>
struct As { // a vector's lanes
  Lane lane[sizeof(Vector) / sizeof(Lane)];
  explicit As(const Vector& vector) { memcpy(lane, &vector, sizeof lane); }
  Lane operator[](int index) const { return lane[index]; }
};
template <class V>
inline As<float, V> floats(const V& vector) { return As<float, V>(vector); }
template <class V>
inline As<int32_t, V> ints(const V& vector) { return As<int32_t, V>(vector); }
template <class V>
inline As<uint32_t, V> words(const V& vector) { return As<uint32_t, V>(vector); }
template <class V>
inline As<int16_t, V> shorts(const V& vector) { return As<int16_t, V>(vector); }
template <class V>
inline As<uint16_t, V> halves(const V& vector) { return As<uint16_t, V>(vector); }
template <class V>
inline As<int8_t, V> chars(const V& vector) { return As<int8_t, V>(vector); }
template <class V>
inline As<uint8_t, V> bytes(const V& vector) { return As<uint8_t, V>(vector); }
template <class V>
inline As<uint64_t, V> longs(const V& vector) { return As<uint64_t, V>(vector); }

inline bool bit(uint64_t mask, int index) { return mask >> index & 1; }

// --- bfloat16: denormals are zeros, going in and coming out; rounded to the nearest even ----------

inline float without_denormal(float value) { return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value; }

inline float from_bf16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return without_denormal(value);
}

inline uint16_t to_bf16_bits(float value) {
  value = without_denormal(value);
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline float fused(float left, float right, float sum) { return without_denormal(__builtin_fmaf(left, right, without_denormal(sum))); }

// --- constants, loads, stores ---------------------------------------------------------------------

inline __m512 _mm512_set1_ps(float value) { SHUTEYE_EACH(__m512, float, 16, (void(i), value)); }
inline __m512 _mm512_setzero_ps() { return _mm512_set1_ps(0.0f); }
inline __m512i _mm512_set1_epi8(char value) { SHUTEYE_EACH(__m512i, char, 64, (void(i), value)); }
inline __m512i _mm512_set1_epi16(short value) { SHUTEYE_EACH(__m512i, short, 32, (void(i), value)); }
inline __m512i _mm512_set1_epi32(int value) { SHUTEYE_EACH(__m512i, int, 16, (void(i), value)); }
inline __m512i _mm512_setzero_si512() { return _mm512_set1_epi32(0); }
inline __m512i _mm512_maskz_set1_epi8(__mmask64 mask, char value) { SHUTEYE_EACH(__m512i, char, 64, bit(mask, i) ? value : '\0'); }
inline __m512i _mm512_broadcast_i32x4(__m128i value) { SHUTEYE_EACH(__m512i, int32_t, 16, ints(value)[i % 4]); }
template <class... Ints>
inline __m512i _mm512_setr_epi32(Ints... values) {
  const int lanes[] = {values...};
  static_assert(sizeof lanes == 64, "sixteen");
  return lanes_of<__m512i>(lanes);
}

inline __m512i _mm512_loadu_si512(const void* source) { return lanes_of<__m512i>(static_cast<const char*>(source)); }
inline __m512i _mm512_load_si512(const void* source) {
  if (reinterpret_cast<uintptr_t>(source) % 64) __builtin_trap();
  return _mm512_loadu_si512(source);
}
inline __m512 _mm512_loadu_ps(const void* source) { return lanes_of<__m512>(static_cast<const char*>(source)); }
inline __m512 _mm512_load_ps(const void* source) {
  if (reinterpret_cast<uintptr_t>(source) % 64) __builtin_trap();
  return _mm512_loadu_ps(source);
}
// Lanes that are masked out are not read.
template <class Vector, class Lane, int count>
inline Vector masked_load(uint64_t mask, const void* source) {
  Lane lanes[count] = {};
  for (int i = 0; i < count; i++)
    if (bit(mask, i)) memcpy(lanes + i, static_cast<const Lane*>(source) + i, sizeof(Lane));
  return lanes_of<Vector>(lanes);
}
inline __m512i _mm512_maskz_loadu_epi8(__mmask64 mask, const void* source) { return masked_load<__m512i, uint8_t, 64>(mask, source); }
inline __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* source) { return masked_load<__m512i, uint16_t, 32>(mask, source); }
inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* source) { return masked_load<__m512, float, 16>(mask, source); }
inline void _mm512_storeu_si512(void* target, __m512i vector) { memcpy(target, &vector, 64); }
inline void _mm512_storeu_ps(void* target, __m512 vector) { memcpy(target, &vector, 64); }
inline void _mm512_store_ps(void* target, __m512 vector) {
  if (reinterpret_cast<uintptr_t>(target) % 64) __builtin_trap();
  memcpy(target, &vector, 64);
}
template <class Lane, class Vector>
inline void masked_store(void* target, uint64_t mask, Vector vector) {
  const As<Lane, Vector> lanes(vector);
  for (unsigned i = 0; i < sizeof(Vector) / sizeof(Lane); i++)
    if (bit(mask, static_cast<int>(i))) memcpy(static_cast<Lane*>(target) + i, lanes.lane + i, sizeof(Lane));
}
inline void _mm512_mask_storeu_ps(void* target, __mmask16 mask, __m512 vector) { masked_store<float>(target, mask, vector); }
inline void _mm512_mask_storeu_epi16(void* target, __mmask32 mask, __m512i vector) { masked_store<uint16_t>(target, mask, vector); }

// --- the same bits as another type ----------------------------------------------------------------

template <class To, class From>
inline To same_bits(const From& from) {
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline __m512d _mm512_castps_pd(__m512 v) { return same_bits<__m512d>(v); }
inline __m512 _mm512_castpd_ps(__m512d v) { return same_bits<__m512>(v); }
inline __m512i _mm512_castps_si512(__m512 v) { return same_bits<__m512i>(v); }
inline __m512 _mm512_castsi512_ps(__m512i v) { return same_bits<__m512>(v); }
inline __m256 _mm512_castps512_ps256(__m512 v) { return same_bits<__m256>(v); }
inline __m256i _mm512_castsi512_si256(__m512i v) { return same_bits<__m256i>(v); }
inline __m256 _mm512_extractf32x8_ps(__m512 v, int half) { SHUTEYE_EACH(__m256, float, 8, floats(v)[half * 8 + i]); }
inline __m256i _mm512_extracti64x4_epi64(__m512i v, int half) { SHUTEYE_EACH(__m256i, uint64_t, 4, longs(v)[half * 4 + i]); }

// --- floats ---------------------------------------------------------------------------------------

inline __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
inline __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
inline __m512 _mm512_div_ps(__m512 a, __m512 b) { return a / b; }
inline __m512 _mm512_max_ps(__m512 a, __m512 b) { SHUTEYE_EACH(__m512, float, 16, floats(a)[i] > floats(b)[i] ? floats(a)[i] : floats(b)[i]); }
inline __m512 _mm512_min_ps(__m512 a, __m512 b) { SHUTEYE_EACH(__m512, float, 16, floats(a)[i] < floats(b)[i] ? floats(a)[i] : floats(b)[i]); }
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  SHUTEYE_EACH(__m512, float, 16, __builtin_fmaf(floats(a)[i], floats(b)[i], floats(c)[i]));
}
inline __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) {
  SHUTEYE_EACH(__m512, float, 16, __builtin_fmaf(-floats(a)[i], floats(b)[i], floats(c)[i]));
}
inline __m512 _mm512_mask_add_ps(__m512 other, __mmask16 mask, __m512 a, __m512 b) {
  SHUTEYE_EACH(__m512, float, 16, bit(mask, i) ? floats(a)[i] + floats(b)[i] : floats(other)[i]);
}
inline __m512 _mm512_mask_max_ps(__m512 other, __mmask16 mask, __m512 a, __m512 b) {
  const __m512 largest = _mm512_max_ps(a, b);
  SHUTEYE_EACH(__m512, float, 16, bit(mask, i) ? floats(largest)[i] : floats(other)[i]);
}
inline __m512 _mm512_maskz_mov_ps(__mmask16 mask, __m512 v) { SHUTEYE_EACH(__m512, float, 16, bit(mask, i) ? floats(v)[i] : 0.0f); }
inline float estimated_inverse(float value) { // right in 14 bits, no more
  float inverse = 1.0f / value;
  uint32_t bits;
  memcpy(&bits, &inverse, sizeof bits);
  bits &= ~0x1ffu;
  memcpy(&inverse, &bits, sizeof bits);
  return inverse;
}
inline __m512 _mm512_rcp14_ps(__m512 v) { SHUTEYE_EACH(__m512, float, 16, estimated_inverse(floats(v)[i])); }
template <class Join>
inline float reduced(__m512 v, const Join& join) {
  float lane[16];
  memcpy(lane, &v, sizeof lane);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) lane[i] = join(lane[i], lane[i + half]);
  return lane[0];
}
inline float _mm512_reduce_add_ps(__m512 v) { return reduced(v, [](float a, float b) { return a + b; }); }
inline float _mm512_reduce_max_ps(__m512 v) { return reduced(v, [](float a, float b) { return a > b ? a : b; }); }
inline float rounded_to(float value, int control) { // a multiple of 2^-(control / 16)
  const float scaled = std::ldexp(value, control >> 4);
  const int mode = control & 3;
  const float whole = mode == 0 ? std::nearbyint(scaled) : mode == 1 ? std::floor(scaled) : mode == 2 ? std::ceil(scaled) : std::trunc(scaled);
  return std::ldexp(whole, -(control >> 4));
}
inline __m512 _mm512_roundscale_ps(__m512 v, int control) { SHUTEYE_EACH(__m512, float, 16, rounded_to(floats(v)[i], control)); }
inline float left_of_rounding(float value, int control) { return std::isinf(value) ? 0.0f : value - rounded_to(value, control); }
inline __m512 _mm512_reduce_ps(__m512 v, int control) { SHUTEYE_EACH(__m512, float, 16, left_of_rounding(floats(v)[i], control)); }
inline float scaled_by_power(float value, float power) { // value * 2^floor(power)
  if (power != power || value != value) return value + power;
  if (power == INFINITY) return value == 0.0f ? NAN : value * INFINITY;
  if (power == -INFINITY) return std::isinf(value) ? NAN : std::copysign(0.0f, value);
  const float limited = std::fmax(-2000.0f, std::fmin(2000.0f, std::floor(power)));
  return std::scalbn(value, static_cast<int>(limited));
}
inline __m512 _mm512_scalef_ps(__m512 a, __m512 b) { SHUTEYE_EACH(__m512, float, 16, scaled_by_power(floats(a)[i], floats(b)[i])); }
inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int how) {
  uint32_t mask = 0;
  for (int i = 0; i < 16; i++) {
    const float left = floats(a)[i], right = floats(b)[i];
    bool holds = false;
    switch (how) {
      case _CMP_GE_OQ: holds = left >= right; break;
      case _CMP_GT_OQ: holds = left > right; break;
      case _CMP_LT_OQ: holds = left < right; break;
      case _CMP_UNORD_Q: holds = left != left || right != right; break;
      default: __builtin_trap();
    }
    mask |= static_cast<uint32_t>(holds) << i;
  }
  return static_cast<__mmask16>(mask);
}

// --- integers -------------------------------------------------------------------------------------

inline __m512i _mm512_add_epi8(__m512i a, __m512i b) { SHUTEYE_EACH(__m512i, uint8_t, 64, static_cast<uint8_t>(bytes(a)[i] + bytes(b)[i])); }
inline __m512i _mm512_add_epi32(__m512i a, __m512i b) { SHUTEYE_EACH(__m512i, uint32_t, 16, words(a)[i] + words(b)[i]); }
inline __m512i _mm512_sub_epi32(__m512i a, __m512i b) { SHUTEYE_EACH(__m512i, uint32_t, 16, words(a)[i] - words(b)[i]); }
inline __m512i _mm512_mullo_epi32(__m512i a, __m512i b) { SHUTEYE_EACH(__m512i, uint32_t, 16, words(a)[i] * words(b)[i]); }
inline __m512i _mm512_madd_epi16(__m512i a, __m512i b) {
  const auto left = shorts(a), right = shorts(b);
  SHUTEYE_EACH(__m512i, uint32_t, 16, static_cast<uint32_t>(left[2 * i] * right[2 * i]) + static_cast<uint32_t>(left[2 * i + 1] * right[2 * i + 1]));
}
inline __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
inline __m512i _mm512_slli_epi32(__m512i v, unsigned count) { SHUTEYE_EACH(__m512i, uint32_t, 16, count > 31 ? 0u : words(v)[i] << count); }
inline __m512i _mm512_srli_epi32(__m512i v, unsigned count) { SHUTEYE_EACH(__m512i, uint32_t, 16, count > 31 ? 0u : words(v)[i] >> count); }
inline __m512i _mm512_slli_epi16(__m512i v, unsigned count) { SHUTEYE_EACH(__m512i, uint16_t, 32, static_cast<uint16_t>(count > 15 ? 0 : halves(v)[i] << count)); }
inline __m512i _mm512_srli_epi16(__m512i v, unsigned count) { SHUTEYE_EACH(__m512i, uint16_t, 32, static_cast<uint16_t>(count > 15 ? 0 : halves(v)[i] >> count)); }
template <class Holds>
inline __mmask16 mask_of(const Holds& holds) {
  uint32_t mask = 0;
  for (int i = 0; i < 16; i++) mask |= static_cast<uint32_t>(holds(i)) << i;
  return static_cast<__mmask16>(mask);
}
inline __mmask16 _mm512_cmple_epi32_mask(__m512i a, __m512i b) { return mask_of([&](int i) { return ints(a)[i] <= ints(b)[i]; }); }
inline __mmask16 _mm512_cmpge_epi32_mask(__m512i a, __m512i b) { return mask_of([&](int i) { return ints(a)[i] >= ints(b)[i]; }); }
inline __mmask16 _mm512_mask_cmpgt_epi32_mask(__mmask16 mask, __m512i a, __m512i b) {
  return mask_of([&](int i) { return bit(mask, i) && ints(a)[i] > ints(b)[i]; });
}
inline __mmask16 _mm512_test_epi32_mask(__m512i a, __m512i b) { return mask_of([&](int i) { return (ints(a)[i] & ints(b)[i]) != 0; }); }
inline __m512i _mm512_mask_mov_epi16(__m512i other, __mmask32 mask, __m512i v) { SHUTEYE_EACH(__m512i, uint16_t, 32, bit(mask, i) ? halves(v)[i] : halves(other)[i]); }
inline __m512i _mm512_mask_blend_epi16(__mmask32 mask, __m512i a, __m512i b) { return _mm512_mask_mov_epi16(a, mask, b); }

// --- lanes to other places: within each 128 bits but where the name says otherwise ----------------

template <class Vector, class Lane, bool high>
inline Vector unpacked(const Vector& a, const Vector& b) {
  constexpr int count = 64 / sizeof(Lane), per_part = 16 / sizeof(Lane);
  const As<Lane, Vector> left(a), right(b);
  Lane result[count];
  for (int i = 0; i < count; i++) {
    const int from = i / per_part * per_part + i % per_part / 2 + (high ? per_part / 2 : 0);
    result[i] = i % 2 ? right[from] : left[from];
  }
  return lanes_of<Vector>(result);
}
inline __m512i _mm512_unpacklo_epi16(__m512i a, __m512i b) { return unpacked<__m512i, uint16_t, false>(a, b); }
inline __m512i _mm512_unpackhi_epi16(__m512i a, __m512i b) { return unpacked<__m512i, uint16_t, true>(a, b); }
inline __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) { return unpacked<__m512i, uint32_t, false>(a, b); }
inline __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) { return unpacked<__m512i, uint32_t, true>(a, b); }
inline __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) { return unpacked<__m512i, uint64_t, false>(a, b); }
inline __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) { return unpacked<__m512i, uint64_t, true>(a, b); }
inline __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) { return unpacked<__m512, float, false>(a, b); }
inline __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) { return unpacked<__m512, float, true>(a, b); }
inline __m512d _mm512_unpacklo_pd(__m512d a, __m512d b) { return unpacked<__m512d, double, false>(a, b); }
inline __m512d _mm512_unpackhi_pd(__m512d a, __m512d b) { return unpacked<__m512d, double, true>(a, b); }
inline __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int control) {
  SHUTEYE_EACH(__m512, float, 16, floats(i % 4 < 2 ? a : b)[i / 4 * 4 + (control >> i % 4 * 2 & 3)]);
}
inline __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int control) { // whole quarters of 128 bits
  SHUTEYE_EACH(__m512i, uint32_t, 16, words(i < 8 ? a : b)[(control >> i / 4 * 2 & 3) * 4 + i % 4]);
}
inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int control) {
  SHUTEYE_EACH(__m512, float, 16, floats(i < 8 ? a : b)[(control >> i / 4 * 2 & 3) * 4 + i % 4]);
}
inline __m512i _mm512_shuffle_epi8(__m512i v, __m512i index) {
  SHUTEYE_EACH(__m512i, uint8_t, 64, static_cast<uint8_t>(bytes(index)[i] & 0x80 ? 0 : bytes(v)[i / 16 * 16 + (bytes(index)[i] & 15)]));
}
inline __m512 _mm512_permutex2var_ps(__m512 a, __m512i index, __m512 b) { // from anywhere in both
  SHUTEYE_EACH(__m512, float, 16, floats(words(index)[i] & 16 ? b : a)[static_cast<int>(words(index)[i] & 15)]);
}

// --- from one type to another ---------------------------------------------------------------------

inline __m512i _mm512_cvtepu16_epi32(__m256i v) { SHUTEYE_EACH(__m512i, int32_t, 16, halves(v)[i]); }
inline __m512i _mm512_cvtepi8_epi32(__m128i v) { SHUTEYE_EACH(__m512i, int32_t, 16, chars(v)[i]); }
inline __m512i _mm512_cvtepi8_epi16(__m256i v) { SHUTEYE_EACH(__m512i, int16_t, 32, chars(v)[i]); }
inline __m512i _mm512_cvtepu8_epi32(__m128i v) { SHUTEYE_EACH(__m512i, int32_t, 16, bytes(v)[i]); }
inline __m512 _mm512_cvtepi32_ps(__m512i v) { SHUTEYE_EACH(__m512, float, 16, static_cast<float>(ints(v)[i])); }
inline int32_t to_int(float value) { // what does not fit: the smallest
  return value >= -2147483648.0f && value < 2147483648.0f ? static_cast<int32_t>(std::nearbyint(value)) : INT32_MIN;
}
inline __m512i _mm512_cvtps_epi32(__m512 v) { SHUTEYE_EACH(__m512i, int32_t, 16, to_int(floats(v)[i])); }
inline __m128i _mm512_cvtsepi32_epi8(__m512i v) {
  SHUTEYE_EACH(__m128i, int8_t, 16, static_cast<int8_t>(ints(v)[i] > 127 ? 127 : ints(v)[i] < -128 ? -128 : ints(v)[i]));
}
inline __m512 _mm512_cvtph_ps(__m256i v) { SHUTEYE_EACH(__m512, float, 16, _cvtsh_ss(halves(v)[i])); }
inline __m256i _mm512_cvtps_ph(__m512 v, int) { // to the nearest
  SHUTEYE_EACH(__m256i, uint16_t, 16, _cvtss_sh(floats(v)[i], _MM_FROUND_TO_NEAREST_INT));
}
inline __m256i _mm512_cvtsepi32_epi16(__m512i v) {
  SHUTEYE_EACH(__m256i, int16_t, 16, static_cast<int16_t>(ints(v)[i] > 32767 ? 32767 : ints(v)[i] < -32768 ? -32768 : ints(v)[i]));
}
inline __m256bh _mm512_cvtneps_pbh(__m512 v) { SHUTEYE_EACH(__m256bh, uint16_t, 16, to_bf16_bits(floats(v)[i])); }
inline __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  SHUTEYE_EACH(__m512bh, uint16_t, 32, to_bf16_bits(floats(i < 16 ? low : high)[i % 16]));
}

// --- products of pairs and of fours ---------------------------------------------------------------

// The second of a pair is added first.
inline __m512 _mm512_dpbf16_ps(__m512 sums, __m512bh a, __m512bh b) {
  const auto left = halves(a), right = halves(b);
  const auto before = floats(sums);
  SHUTEYE_EACH(__m512, float, 16,
               fused(from_bf16(left[2 * i]), from_bf16(right[2 * i]),
                     fused(from_bf16(left[2 * i + 1]), from_bf16(right[2 * i + 1]), before[i])));
}
inline __m512i _mm512_dpbusd_epi32(__m512i sums, __m512i a, __m512i b) {
  const auto left = bytes(a);
  const auto right = chars(b);
  const auto before = ints(sums);
  SHUTEYE_EACH(__m512i, int32_t, 16,
               before[i] + left[4 * i] * right[4 * i] + left[4 * i + 1] * right[4 * i + 1] +
                   left[4 * i + 2] * right[4 * i + 2] + left[4 * i + 3] * right[4 * i + 3]);
}

inline __m256i _mm256_dpbusd_avx_epi32(__m256i sums, __m256i a, __m256i b) {
  uint8_t left[32];
  int8_t right[32];
  int32_t totals[8];
  memcpy(left, &a, sizeof left);
  memcpy(right, &b, sizeof right);
  memcpy(totals, &sums, sizeof totals);
  for (int byte = 0; byte < 32; byte++) totals[byte / 4] += left[byte] * right[byte];
  memcpy(&sums, totals, sizeof sums);
  return sums;
}

#undef SHUTEYE_EACH

// --- tiles ----------------------------------------------------------------------------------------

struct Tile {
  int rows = 0;
  int row_bytes = 0;
  uint8_t data[16][64];

  template <class Lane>
  Lane get(int row, int index) const {
    Lane lane;
    memcpy(&lane, data[row] + index * sizeof lane, sizeof lane);
    return lane;
  }
};

inline thread_local Tile tiles[8];
inline thread_local bool tiles_configured = false;

inline Tile& tile(int index) {
  if (!tiles_configured) __builtin_trap(); // as the processor would
  return tiles[index];
}

inline void _tile_loadconfig(const void* memory) {
  const auto* config = static_cast<const uint8_t*>(memory);
  if (config[0] != 1) __builtin_trap();
  for (int index = 0; index < 8; index++) {
    uint16_t row_bytes;
    memcpy(&row_bytes, config + 16 + 2 * index, sizeof row_bytes);
    tiles[index].rows = config[48 + index];
    tiles[index].row_bytes = row_bytes;
    if (tiles[index].rows > 16 || row_bytes > 64) __builtin_trap();
    memset(tiles[index].data, 0, sizeof tiles[index].data);
  }
  tiles_configured = true;
}
inline void _tile_release() { tiles_configured = false; }
inline void _tile_zero(int index) { memset(tile(index).data, 0, sizeof(Tile::data)); }
inline void _tile_loadd(int index, const void* memory, int64_t stride) {
  Tile& own = tile(index);
  memset(own.data, 0, sizeof own.data);
  for (int row = 0; row < own.rows; row++) memcpy(own.data[row], static_cast<const char*>(memory) + row * stride, own.row_bytes);
}
inline void _tile_stored(int index, void* memory, int64_t stride) {
  const Tile& own = tile(index);
  for (int row = 0; row < own.rows; row++) memcpy(static_cast<char*>(memory) + row * stride, own.data[row], own.row_bytes);
}

inline void _tile_dpbssd(int target, int a, int b) {
  Tile& sums = tile(target);
  const Tile &left = tile(a), &right = tile(b);
  if (left.row_bytes / 4 != right.rows || sums.rows != left.rows || sums.row_bytes != right.row_bytes) __builtin_trap();
  for (int row = 0; row < sums.rows; row++) {
    for (int column = 0; column < sums.row_bytes / 4; column++) {
      int32_t sum = sums.get<int32_t>(row, column);
      for (int byte = 0; byte < left.row_bytes; byte++) {
        sum += left.get<int8_t>(row, byte) * right.get<int8_t>(byte / 4, 4 * column + byte % 4);
      }
      memcpy(sums.data[row] + column * sizeof sum, &sum, sizeof sum);
    }
  }
}

// Firsts and seconds of all pairs are added up apart, and both to what was there.
inline void _tile_dpbf16ps(int target, int a, int b) {
  Tile& sums = tile(target);
  const Tile &left = tile(a), &right = tile(b);
  if (left.row_bytes / 4 != right.rows || sums.rows != left.rows || sums.row_bytes != right.row_bytes) __builtin_trap();
  for (int row = 0; row < sums.rows; row++) {
    float firsts[16] = {}, seconds[16] = {};
    for (int pair = 0; pair < right.rows; pair++) {
      const float first = from_bf16(left.get<uint16_t>(row, 2 * pair)), second = from_bf16(left.get<uint16_t>(row, 2 * pair + 1));
      for (int column = 0; column < 16; column++) {
        firsts[column] = fused(first, from_bf16(right.get<uint16_t>(pair, 2 * column)), firsts[column]);
        seconds[column] = fused(second, from_bf16(right.get<uint16_t>(pair, 2 * column + 1)), seconds[column]);
      }
    }
    for (int column = 0; column < sums.row_bytes / 4; column++) {
      const float sum = without_denormal(without_denormal(sums.get<float>(row, column)) + without_denormal(firsts[column] + seconds[column]));
      memcpy(sums.data[row] + column * sizeof sum, &sum, sizeof sum);
    }
  }
}

} // namespace
