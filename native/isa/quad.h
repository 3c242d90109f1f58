// Reductions of four 256-bit registers at once: a fifth of the instructions of four reductions, and one latency.
#pragma once
#include <immintrin.h>

namespace tersekv::TERSEKV_ISA {

// Four registers to four numbers: neighbours are joined twice, and then the halves of what is left.
#define TERSEKV_QUAD(NAME, JOIN, JOIN_HALF)                                                                       \
  static INLINE __m128 NAME(__m256 a, __m256 b, __m256 c, __m256 d) {                                             \
    const __m256 ab = JOIN(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));                                   \
    const __m256 cd = JOIN(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));                                   \
    const __m256d low = _mm256_unpacklo_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));                           \
    const __m256d high = _mm256_unpackhi_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));                          \
    const __m256 all = JOIN(_mm256_castpd_ps(low), _mm256_castpd_ps(high));                                       \
    return JOIN_HALF(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));                                 \
  }
TERSEKV_QUAD(quad_max, _mm256_max_ps, _mm_max_ps)
TERSEKV_QUAD(quad_sum, _mm256_add_ps, _mm_add_ps)
#undef TERSEKV_QUAD

// Sums of four registers in the order of the format: lanes 8, 4, 2, 1, each time the first half plus the second.
static INLINE __m128 quad_halved(const __m256 x[4]) {
  __m128 four[4];
  for (int r = 0; r < 4; r++) four[r] = _mm_add_ps(_mm256_castps256_ps128(x[r]), _mm256_extractf128_ps(x[r], 1));
  _MM_TRANSPOSE4_PS(four[0], four[1], four[2], four[3]);
  return _mm_add_ps(_mm_add_ps(four[0], four[2]), _mm_add_ps(four[1], four[3]));
}

}  // namespace tersekv::TERSEKV_ISA
