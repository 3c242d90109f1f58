// From scores to weights in 8 bits, and the running sums of a warp.
#pragma once
#include "sizes.cuh"

// A warp's running softmax over its pages. Scores are in units of log2, relative to `ref` of their column.
struct Softmax {
  float out[SUMS][4], ref[2], mass[2], zero[2], middle[2];
  float gain[2], page_zero[2], page_mass[2];  // of the page under way
  bool first;

  INLINE Softmax() : first(true) {
#pragma unroll
    for (int m = 0; m < SUMS; m++)
#pragma unroll
      for (int i = 0; i < 4; i++) out[m][i] = 0;
#pragma unroll
    for (int j = 0; j < 2; j++) ref[j] = mass[j] = zero[j] = middle[j] = 0;
  }

  // From a number of each column's head to those of the heads that `out` holds with a trellis: see `mix_walks`.
  static INLINE void of_heads(const float (&x)[2], float (&of)[HEADS / 2]) {
#pragma unroll
    for (int j = 0; j < HEADS / 2; j++) {
      const float even = __shfl_sync(~0u, x[0], j), odd = __shfl_sync(~0u, x[1], j);
      of[j] = threadIdx.x % 4 < 2 ? even : odd;
    }
  }

  // Move the reference point to the largest score of each column; the rare case after the first page.
  INLINE void move(float (&s)[TOKENS][2], float (&p)[TOKENS][2]) {
    float fade[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      float top = s[0][j];
#pragma unroll
      for (int t = 1; t < TOKENS; t++) top = fmaxf(top, s[t][j]);
      top = row_max(top);
      if constexpr (V::TRELLIS)
#pragma unroll
        for (int i = HEADS / 2; i < 4; i *= 2) top = fmaxf(top, across(top, i));
      if (top == -INFINITE || (!first && top < 0)) top = 0;
      fade[j] = first ? 0.f : exp2_fast(-top);
      ref[j] += top, mass[j] *= fade[j], zero[j] *= fade[j], middle[j] *= fade[j];
#pragma unroll
      for (int t = 0; t < TOKENS; t++) p[t][j] = exp2_fast(s[t][j] -= top);
    }
    float of_sums[HEADS / 2];
    if constexpr (V::TRELLIS) of_heads(fade, of_sums);
#pragma unroll
    for (int m = 0; m < SUMS; m++)
#pragma unroll
      for (int i = 0; i < 4; i++) out[m][i] *= V::TRELLIS ? of_sums[m % (HEADS / 2)] : fade[i % 2];
    first = false;
  }

  // Scores to weights in the lowest byte: over the largest weight of the page and column, or of its head with a trellis.
  INLINE void weigh(float (&s)[TOKENS][2], const float (&scale)[TOKENS], const float (&offset)[TOKENS],
                    u32 (&byte)[TOKENS][2]) {
    float p[TOKENS][2], sum[2] = {0, 0};
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
#pragma unroll
      for (int j = 0; j < 2; j++) sum[j] += p[t][j] = exp2_fast(s[t][j]);
    if (__any_sync(~0u, first || sum[0] > LIMIT || sum[1] > LIMIT)) {
      move(s, p);
      sum[0] = sum[1] = 0;
#pragma unroll
      for (int t = 0; t < TOKENS; t++) sum[0] += p[t][0], sum[1] += p[t][1];
    }
    float w[TOKENS][2], largest[2] = {0, 0};
    page_zero[0] = page_zero[1] = 0;
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        w[t][j] = p[t][j] * scale[t];
        largest[j] = fmaxf(largest[j], w[t][j]);
        if constexpr (V_ZERO) page_zero[j] += p[t][j] * offset[t];
      }
    // Upper halves of the two maxima, rounded up, so that no weight exceeds 255.
    u32 both = prmt(__float_as_uint(largest[0]), __float_as_uint(largest[1]), 0x7632) + 0x00010001u;
    both = max_bfloats(both, across(both, 4));
    both = max_bfloats(both, across(both, 8));
    both = max_bfloats(both, across(both, 16));
    if constexpr (V::TRELLIS)
#pragma unroll
      for (int i = HEADS / 2; i < 4; i *= 2) both = max_bfloats(both, across(both, i));
    const float top[2] = {__uint_as_float(both << 16) + TINY, __uint_as_float(both & 0xFFFF0000u) + TINY};
    const float inverse[2] = {255.f * reciprocal(top[0]), 255.f * reciprocal(top[1])};
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
#pragma unroll
      for (int j = 0; j < 2; j++) byte[t][j] = __float_as_uint(fmaf(w[t][j], inverse[j], MAGIC));
#pragma unroll
    for (int j = 0; j < 2; j++) {
      mass[j] += sum[j];
      gain[j] = top[j] * (1.f / 255);
      if constexpr (V_CHANNELS) page_mass[j] = row_sum(sum[j]), page_zero[j] = row_sum(page_zero[j]);
      else zero[j] += page_zero[j];
    }
  }
};

// Weights as operands B of the values' columns.
INLINE void columns(const u32 (&byte)[TOKENS][2], u32 (&b)[4]) {
  u32 cells[TILES];
#pragma unroll
  for (int i = 0; i < TILES; i++) {
    const u32 left = prmt(byte[2 * i][0], byte[2 * i + 1][0], 0x0040);
    const u32 right = prmt(byte[2 * i][1], byte[2 * i + 1][1], 0x0040);
    cells[i] = transpose(prmt(left, right, 0x5410));
  }
  const int group = threadIdx.x % 32 / 4 / HEADS;
#pragma unroll
  for (int x = 0; x < 4; x++) b[x] = GROUPS == 1 || group == x / TILES ? cells[x % TILES] : 0;
}
