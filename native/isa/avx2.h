// AVX2, and AVX-VNNI on 256-bit registers where the compiler is told of it.
#pragma once
#include <immintrin.h>

#define TERSEKV_WIDTH 32
#include "../vector.h"
#include "quad.h"

namespace tersekv::TERSEKV_ISA {

struct Isa : Vector {
  static constexpr int STRIP = 4, TILES = 1, REGISTERS = 16, INDEX_BITS = 4;

  static INLINE Bytes look_up(Bytes table, Bytes index, Bytes mask) {
    return (Bytes)_mm256_shuffle_epi8((__m256i)table, (__m256i)(index & mask));
  }
  static INLINE Ints dot(Ints sum, Bytes a, int32_t four) {
    const __m256i b = _mm256_set1_epi32(four);
#ifdef __AVXVNNI__
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)a, b);
#else
    // Levels and queries are at most 127 in magnitude, so a sum of two products fits 16 bits: no saturation.
    __m256i pairs = _mm256_maddubs_epi16((__m256i)a, b);
    sum += (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    __asm__("" : "+x"(sum));  // GCC would multiply all of a unit first, and add from the stack
    return sum;
#endif
  }
  static INLINE Bytes transposed(Bytes x) {
    const __m128i how = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return (Bytes)_mm256_shuffle_epi8((__m256i)x, _mm256_broadcastsi128_si256(how));
  }
  static INLINE Ints lanes(const uint8_t* first, const uint8_t* second, int split) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(first));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(split > 1 ? first : second));
    return (Ints)_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
  }
  // Sixteen entries a look-up, which gives 0 for a negative index: index 16 k + i meets look-ups 0..k, so each holds
  // what differs from the one before.
  struct Bytes128 {
    alignas(16) uint8_t change[128];
    explicit Bytes128(const uint8_t* table) {
      for (int i = 0; i < 128; i++) change[i] = uint8_t(table[i] ^ (i < 16 ? 0 : table[i - 16]));
    }
    INLINE Bytes operator()(Bytes index) const {
      __m256i out = _mm256_setzero_si256(), i = _mm256_and_si256((__m256i)index, _mm256_set1_epi8(127));
      for (int part = 0; part < 8; part++) {
        const __m128i entries = _mm_load_si128(reinterpret_cast<const __m128i*>(change + 16 * part));
        out = _mm256_xor_si256(out, _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), i));
        i = _mm256_sub_epi8(i, _mm256_set1_epi8(16));
      }
      return (Bytes)out;
    }
  };
  template <int BITS>
  struct Table {
    const float* entries;
    __m256 low, high;
    explicit Table(const float* table) : entries(table) {
      float both[16];
      for (int i = 0; i < 16; i++) both[i] = table[i & ((1 << BITS) - 1)];
      low = _mm256_loadu_ps(both), high = _mm256_loadu_ps(both + 8);
    }
    INLINE Floats operator()(Ints index) const {
      const __m256i i = (__m256i)index;
      if constexpr (BITS <= 3) return (Floats)_mm256_permutevar8x32_ps(low, i);
      if constexpr (BITS == 8)
        return (Floats)_mm256_i32gather_ps(entries, _mm256_and_si256(i, _mm256_set1_epi32(255)), 4);
      __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));  // bit 3 chooses the half
      return (Floats)_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, i), _mm256_permutevar8x32_ps(high, i), upper);
    }
  };
  static INLINE Floats max(Floats a, Floats b) { return (Floats)_mm256_max_ps((__m256)a, (__m256)b); }
  static INLINE Quad highest(const Floats x[4]) {
    return (Quad)quad_max((__m256)x[0], (__m256)x[1], (__m256)x[2], (__m256)x[3]);
  }
  static INLINE Quad sums(const Floats x[4]) {
    return (Quad)quad_sum((__m256)x[0], (__m256)x[1], (__m256)x[2], (__m256)x[3]);
  }
  static INLINE void store_int8(int8_t* p, Floats x) {
    const __m256i each = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                          0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i low = _mm256_shuffle_epi8((__m256i)x, each);
    const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), both);
  }
  static INLINE Floats from_half(const void* p) {
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  static INLINE Floats from_bfloat(const void* p) {
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))), 16);
  }
  static INLINE Floats from_int8(const void* p) {
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
  }
  // Twelve steps an octave: the table's entries 144..155 are 2^(0/12)..2^(11/12), the rest is an exponent.
  static INLINE Floats from_log8(const uint8_t* p, const float* table) {
    const __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m256i octave = _mm256_srli_epi32(_mm256_madd_epi16(code, _mm256_set1_epi32(171)), 11);
    const __m256i step = _mm256_sub_epi32(code, _mm256_madd_epi16(octave, _mm256_set1_epi32(12)));
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 144), step);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 152), step);
    const __m256 first = _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(step, 28)));
    const __m256i power = _mm256_slli_epi32(_mm256_sub_epi32(octave, _mm256_set1_epi32(12)), 23);
    const __m256i value = _mm256_add_epi32(_mm256_castps_si256(first), power);
    return (Floats)_mm256_andnot_si256(_mm256_cmpeq_epi32(code, _mm256_setzero_si256()), value);
  }

  template <int S>
  static INLINE __m256 butterfly(__m256 x, __m256 other) {
    alignas(32) float sign[8];
    for (int i = 0; i < 8; i++) sign[i] = i & S ? -1.f : 1.f;
    return _mm256_fmadd_ps(x, _mm256_load_ps(sign), other);  // the product is exact: one rounding
  }
  static INLINE Floats hadamard(Floats floats) {
    __m256 x = (__m256)floats;
    x = butterfly<1>(x, _mm256_permute_ps(x, 0xb1));
    x = butterfly<2>(x, _mm256_permute_ps(x, 0x4e));
    return (Floats)butterfly<4>(x, _mm256_permute2f128_ps(x, x, 1));
  }
  static INLINE Quad halved(const Floats x[4]) { return (Quad)quad_halved(reinterpret_cast<const __m256*>(x)); }
  static INLINE Ints least(Ints a, Ints b) { return (Ints)_mm256_min_epi32((__m256i)a, (__m256i)b); }
  static INLINE Ints plus_pairs(Ints sum, int32_t pair, Ints other) {
#ifdef __AVXVNNI__
    return (Ints)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)other, _mm256_set1_epi32(pair));
#else
    return sum + (Ints)_mm256_madd_epi16((__m256i)other, _mm256_set1_epi32(pair));
#endif
  }
  static INLINE void store_words(uint8_t* p, const Ints code[4]) {
    const __m256i ab = _mm256_packus_epi32((__m256i)code[0], (__m256i)code[1]);
    const __m256i all = _mm256_packus_epi16(ab, _mm256_packus_epi32((__m256i)code[2], (__m256i)code[3]));
    __m128i* to = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(to, _mm256_castsi256_si128(all));
    _mm_storeu_si128(to + 16, _mm256_extracti128_si256(all, 1));
  }
};

}  // namespace tersekv::TERSEKV_ISA
