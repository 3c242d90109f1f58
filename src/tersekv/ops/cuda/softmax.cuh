// From scores to weights in 8 bits, and the running sums of a warp.
#pragma once
#include "sizes.cuh"

// A warp's running softmax over its pages. Scores are in units of log2, relative to `ref` of their row.
struct Softmax {
  float out[SUMS][2][USED], ref[MINE], mass[MINE], zero[MINE], middle[MINE];
  float gain[MINE], page_zero[MINE], page_mass[MINE];  // of the page under way: see `weigh`
  bool first;  // whether that page is the warp's first

  INLINE Softmax() {
#pragma unroll
    for (int m = 0; m < SUMS; m++)
#pragma unroll
      for (int i = 0; i < 2 * USED; i++) out[m][i / USED][i % USED] = 0;
#pragma unroll
    for (int j = 0; j < MINE; j++) ref[j] = mass[j] = zero[j] = middle[j] = 0;
  }

  // From a number of a lane's rows to those of the rows that `out` holds with a trellis: see `mix_walks`.
  static INLINE void of_heads(const float (&x)[MINE], float (&of)[HEADS / 2]) {
#pragma unroll
    for (int j = 0; j < HEADS / 2; j++) {
      const float even = __shfl_sync(~0u, x[j / 2], 2 * j % 4), odd = __shfl_sync(~0u, x[j / 2], 2 * j % 4 + 1);
      of[j] = threadIdx.x % 4 < 2 ? even : odd;
    }
  }

  // Move the reference point to the largest score of each row; the rare case after the first page.
  INLINE void move(float (&s)[TOKENS][MINE], float (&p)[TOKENS][MINE]) {
    float fade[MINE];
#pragma unroll
    for (int j = 0; j < MINE; j++) {
      float top = s[0][j];
#pragma unroll
      for (int t = 1; t < TOKENS; t++) top = fmaxf(top, s[t][j]);
      top = row_max(top);
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
      for (int i = 0; i < 2 * USED; i++)
        out[m][i / USED][i % USED] *= V::TRELLIS ? of_sums[m % (HEADS / 2)] : fade[i % USED];
  }

  // Scores to weights in the lowest byte: over the largest weight of the page and row.
  INLINE void weigh(float (&s)[TOKENS][MINE], const float (&scale)[TOKENS], const float (&offset)[TOKENS],
                    u32 (&byte)[TOKENS][MINE]) {
    float p[TOKENS][MINE], sum[MINE];
    bool large = first;
#pragma unroll
    for (int j = 0; j < MINE; j++) {
      sum[j] = 0;
#pragma unroll
      for (int t = 0; t < TOKENS; t++) sum[j] += p[t][j] = exp2_fast(s[t][j]);
      large = large || sum[j] > LIMIT;
    }
    if (__any_sync(~0u, large)) {
      move(s, p);
#pragma unroll
      for (int j = 0; j < MINE; j++) {
        sum[j] = 0;
#pragma unroll
        for (int t = 0; t < TOKENS; t++) sum[j] += p[t][j];
      }
    }
    float w[TOKENS][MINE], largest[MINE], weight[MINE];  // the last: what zeros of channels are multiplied by
#pragma unroll
    for (int j = 0; j < MINE; j++) {
      largest[j] = page_zero[j] = weight[j] = 0;
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        w[t][j] = p[t][j] * scale[t];
        largest[j] = fmaxf(largest[j], w[t][j]);
        if constexpr (V::CHANNELS_FIRST) weight[j] += w[t][j];
        if constexpr (V_ZERO) page_zero[j] += p[t][j] * offset[t];
      }
    }
    // Upper halves of two maxima, rounded up, so that no weight exceeds 255.
    u32 both = prmt(__float_as_uint(largest[0]), __float_as_uint(largest[MINE - 1]), 0x7632) + 0x00010001u;
    both = max_bfloats(both, across(both, 4));
    both = max_bfloats(both, across(both, 8));
    both = max_bfloats(both, across(both, 16));
#pragma unroll
    for (int j = 0; j < MINE; j++) {
      const float top = __uint_as_float(j ? both & 0xFFFF0000u : both << 16) + TINY, inverse = 255.f * reciprocal(top);
#pragma unroll
      for (int t = 0; t < TOKENS; t++) byte[t][j] = __float_as_uint(fmaf(w[t][j], inverse, MAGIC));
      mass[j] += sum[j];
      gain[j] = top * (1.f / 255);
      if constexpr (!V::CHANNELS_FIRST) weight[j] = sum[j];
      if constexpr (V_CHANNELS) page_mass[j] = row_sum(weight[j]), page_zero[j] = row_sum(page_zero[j]);
      else zero[j] += page_zero[j];
    }
  }
};

// Weights as operands B of the values' columns: row lane % 4 + 4j of four is column 2 * (lane % 4) + j. With four rows at
// a time, nothing is read from the other columns.
INLINE void columns(const u32 (&byte)[TOKENS][MINE], u32 (&b)[4]) {
#pragma unroll
  for (int x = 0; x < 4; x++) {
    u32 cells = prmt(byte[2 * x][0], byte[2 * x + 1][0], 0x0040);
    if constexpr (MINE == 2) cells = prmt(cells, prmt(byte[2 * x][1], byte[2 * x + 1][1], 0x0040), 0x5410);
    b[x] = transpose(cells);
  }
}
