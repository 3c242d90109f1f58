// 512-bit registers: AVX-512 with VBMI (byte permutes) and VNNI (dot products of bytes).
#pragma once
#include <immintrin.h>

#define TERSEKV_WIDTH 64
#include "../vector.h"
#include "quad.h"

namespace tersekv::TERSEKV_ISA {

struct Zmm : Vector {
  static constexpr int STRIP = 4, TILES = 2, REGISTERS = 32, INDEX_BITS = 6;

  // vpermb uses six bits of an index; the table repeats, so what lies above a code in its byte does not matter.
  static INLINE Bytes look_up(Bytes table, Bytes index, Bytes) {
    return (Bytes)_mm512_permutexvar_epi8((__m512i)index, (__m512i)table);
  }
  static INLINE Ints dot(Ints sum, Bytes a, int32_t four) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, _mm512_set1_epi32(four));
  }
  static INLINE Ints shifted_in(Ints now, Ints before, Ints after) {
    return (Ints)_mm512_shrdv_epi32((__m512i)now, (__m512i)before, (__m512i)after);
  }
  // vpmultishiftqb takes any eight bits of a 64-bit lane, for each of its bytes.
  template <int BITS>
  static INLINE Bytes windows(Ints x) {
    constexpr uint32_t WHERE = 3 * BITS | 2 * BITS << 8 | BITS << 16;
    const __m512i where = _mm512_set1_epi64(int64_t(WHERE | uint64_t(WHERE + 0x20202020) << 32));
    return (Bytes)_mm512_multishift_epi64_epi8(where, (__m512i)x);
  }
  static INLINE Bytes transposed(Bytes x) {
    const __m128i how = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return (Bytes)_mm512_shuffle_epi8((__m512i)x, _mm512_broadcast_i32x4(how));
  }
  static INLINE Ints lanes(const uint8_t* first, const uint8_t* second, int split) {
    const __m512i low = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(first)));
    if (split >= 4) return (Ints)low;
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(second));
    return (Ints)_mm512_mask_broadcast_i32x4(low, __mmask16(0xffff << 4 * split), high);
  }
  struct Bytes128 {
    __m512i low, high;
    explicit Bytes128(const uint8_t* table) : low(_mm512_loadu_si512(table)), high(_mm512_loadu_si512(table + 64)) {}
    INLINE Bytes operator()(Bytes index) const { return (Bytes)_mm512_permutex2var_epi8(low, (__m512i)index, high); }
  };
  static INLINE Bytes turned_round(Bytes level, Bytes sign) {
    const __mmask64 negative = _mm512_movepi8_mask((__m512i)sign);
    return (Bytes)_mm512_mask_sub_epi8((__m512i)level, negative, _mm512_set1_epi8(127), (__m512i)level);
  }
  template <int BITS>
  struct Table {
    const float* entries;
    __m512 near;
    explicit Table(const float* table) : entries(table) {
      alignas(64) float repeated[16];
      for (int i = 0; i < 16; i++) repeated[i] = table[i & ((1 << BITS) - 1)];
      near = _mm512_load_ps(repeated);
    }
    INLINE Floats operator()(Ints index) const {
      if constexpr (BITS <= 4) return (Floats)_mm512_permutexvar_ps((__m512i)index, near);
      return (Floats)_mm512_i32gather_ps((__m512i)index & _mm512_set1_epi32(255), entries, 4);
    }
  };
  static INLINE float sum(Floats x) { return _mm512_reduce_add_ps((__m512)x); }
  static INLINE Floats max(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
  // One instruction instead of two.
  static INLINE Floats larger(Floats a, Floats x) { return (Floats)_mm512_range_ps((__m512)a, (__m512)x, 0b1011); }
  static INLINE Quad highest(const Floats x[4]) {
    __m256 half[4];
    for (int r = 0; r < 4; r++)
      half[r] = _mm256_max_ps(_mm512_castps512_ps256((__m512)x[r]), _mm512_extractf32x8_ps((__m512)x[r], 1));
    return (Quad)quad_max(half[0], half[1], half[2], half[3]);
  }
  static INLINE Quad sums(const Floats x[4]) {
    __m256 half[4];
    for (int r = 0; r < 4; r++)
      half[r] = _mm256_add_ps(_mm512_castps512_ps256((__m512)x[r]), _mm512_extractf32x8_ps((__m512)x[r], 1));
    return (Quad)quad_sum(half[0], half[1], half[2], half[3]);
  }
  // As the portable one, with the polynomial's argument in 0..1: vscalefps rounds exponents down, and goes to zero by
  // itself, even from the NaN that -inf leaves as an argument. Rounding and subtracting take half of vreduceps.
  template <int N>
  static INLINE void exp2(Floats (&x)[N]) {
    constexpr float FACTORS[] = {8.989339694e-03f, 5.582631752e-02f, 2.401536107e-01f, 6.931530833e-01f,
                                 9.999999404e-01f};
    Floats r[N], p[N];
    for (int i = 0; i < N; i++) {
      r[i] = x[i] - (Floats)_mm512_roundscale_ps((__m512)x[i], _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
      p[i] = all(1.877576695e-03f);
    }
    for (const float factor : FACTORS)
      for (int i = 0; i < N; i++) p[i] = p[i] * r[i] + all(factor);
    for (int i = 0; i < N; i++) x[i] = (Floats)_mm512_scalef_ps((__m512)p[i], (__m512)x[i]);
  }
  static INLINE void store_int8(int8_t* p, Floats x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)x));
  }
  static INLINE float half(uint16_t h) { return _cvtsh_ss(h); }
  static INLINE Floats from_half(const void* p) {
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  }
  static INLINE Floats from_bfloat(const void* p) {
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))), 16);
  }
  static INLINE Floats from_int8(const void* p) {
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
  }
  // Twelve steps an octave: the table's entries 144..155 are 2^(0/12)..2^(11/12), the rest is an exponent.
  static INLINE Floats from_log8(const uint8_t* p, const float* table) {
    __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    __m512i octave = _mm512_mulhi_epu16(code, _mm512_set1_epi32(5462));
    __m512i step = _mm512_sub_epi32(code, _mm512_madd_epi16(octave, _mm512_set1_epi32(12)));
    __m512i entries = _mm512_sub_epi32(_mm512_loadu_si512(table + 144), _mm512_set1_epi32(12 << 23));
    __m512i first = _mm512_permutexvar_epi32(step, entries), power = _mm512_slli_epi32(octave, 23);
    return (Floats)_mm512_maskz_add_epi32(_mm512_test_epi32_mask(code, code), first, power);
  }

  template <int S>
  static INLINE __m512 butterfly(__m512 x, __m512 other) {
    alignas(64) float sign[16];
    for (int i = 0; i < 16; i++) sign[i] = i & S ? -1.f : 1.f;
    return _mm512_fmadd_ps(x, _mm512_load_ps(sign), other);  // the product is exact: one rounding
  }
  static INLINE Floats hadamard(Floats floats) {
    __m512 x = (__m512)floats;
    x = butterfly<1>(x, _mm512_permute_ps(x, 0xb1));
    x = butterfly<2>(x, _mm512_permute_ps(x, 0x4e));
    x = butterfly<4>(x, _mm512_shuffle_f32x4(x, x, 0xb1));
    return (Floats)butterfly<8>(x, _mm512_shuffle_f32x4(x, x, 0x4e));
  }
  static INLINE Quad halved(const Floats x[4]) {
    __m256 half[4];
    for (int r = 0; r < 4; r++)
      half[r] = _mm256_add_ps(_mm512_castps512_ps256((__m512)x[r]), _mm512_extractf32x8_ps((__m512)x[r], 1));
    return (Quad)quad_halved(half);
  }
  static INLINE Ints count(Ints level, Floats x, Floats threshold) {
    const __mmask16 above = _mm512_cmp_ps_mask((__m512)x, (__m512)threshold, _CMP_GT_OQ);
    return (Ints)_mm512_mask_add_epi32((__m512i)level, above, (__m512i)level, _mm512_set1_epi32(1));
  }
  static INLINE Ints flip(Ints level, Floats sign, Ints mask) {
    const __mmask16 negative = _mm512_cmp_ps_mask((__m512)sign, _mm512_setzero_ps(), _CMP_LT_OQ);
    return (Ints)_mm512_mask_xor_epi32((__m512i)level, negative, (__m512i)level, (__m512i)mask);
  }
  static INLINE Ints least(Ints a, Ints b) { return (Ints)_mm512_min_epi32((__m512i)a, (__m512i)b); }
  static INLINE Ints bytes_in(Ints all, Ints last) { return (Ints)_mm512_shrdi_epi32((__m512i)all, (__m512i)last, 8); }
  static INLINE Ints plus_pairs(Ints sum, int32_t pair, Ints other) {
    return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)other, _mm512_set1_epi32(pair));
  }
  static INLINE Ints gathered(const uint8_t* registers, Ints index) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (Ints)_mm512_i32gather_epi32(_mm512_add_epi32(_mm512_slli_epi32((__m512i)index, 4), lane), registers, 4);
  }
  static INLINE Ints from_bytes(const uint8_t* p) {
    return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static INLINE void store_words(uint8_t* p, const Ints code[4]) {
    const __m512i ab = _mm512_packus_epi32((__m512i)code[0], (__m512i)code[1]);
    const __m512i all = _mm512_packus_epi16(ab, _mm512_packus_epi32((__m512i)code[2], (__m512i)code[3]));
    __m128i* to = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(to, _mm512_castsi512_si128(all));
    _mm_storeu_si128(to + 16, _mm512_extracti32x4_epi32(all, 1));
    _mm_storeu_si128(to + 32, _mm512_extracti32x4_epi32(all, 2));
    _mm_storeu_si128(to + 48, _mm512_extracti32x4_epi32(all, 3));
  }
};

}  // namespace tersekv::TERSEKV_ISA
