// Query rows as 8-bit integers, two to a number.
#pragma once
#include "sizes.cuh"

// Query rows in two 8-bit digits, as operands B. Columns 2h and 2h + 1 are the high and the low digit of row h of four.
struct __align__(16) Queries {
  u32 digits[UNITS][MINE][32][2][2];  // [unit][four rows][lane][half of the unit][register]
  float step[HEADS], sum[HEADS], bias[HEADS];  // of a low digit; of the rounded query; of the channel zeros
};
constexpr int QUERIES = BY_PAGE ? WARPS : 1;

// One row by one warp: (q * channel_scale) in two digits, its sum, and q * channel_zero, both in units of log2.
INLINE void quantise(const float* q, const u8* page, float scale, int row, Queries& to) {
  constexpr int WORDS = (D / 4 + 31) / 32;
  const int lane = threadIdx.x % 32;
  float x[WORDS][4], top = 0, bias = 0;
#pragma unroll
  for (int w = 0; w < WORDS; w++) {
    const int c = 4 * (lane + 32 * w);
#pragma unroll
    for (int i = 0; i < 4; i++) x[w][i] = c < D ? q[c + i] : 0;
    if constexpr (BY_PAGE)
      if (c < D) {
        float gain[4], zero[4];
        numbers_of<K::CHANNEL_SCALE.kind>(page, K::CHANNEL_SCALE, c, 1, gain);
        numbers_of<K::CHANNEL_ZERO.kind>(page, K::CHANNEL_ZERO, c, 0, zero);
#pragma unroll
        for (int i = 0; i < 4; i++) bias += x[w][i] * zero[i], x[w][i] *= gain[i];
      }
#pragma unroll
    for (int i = 0; i < 4; i++) top = fmaxf(top, fabsf(x[w][i]));
  }
#pragma unroll
  for (int i = 1; i < 32; i *= 2) top = fmaxf(top, across(top, i));
  const float inverse = top > TINY ? 127.f * QUERY_STEPS / top : 0, step = top * (1.f / (127.f * QUERY_STEPS));
  float sum = 0;
#pragma unroll
  for (int w = 0; w < WORDS; w++) {
    const int word = lane + 32 * w, to_lane = 8 * (row % 4) + word / (D / 16), k = word % (D / 16) / 2;
    u32 high = 0, low = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float whole = rintf(x[w][i] * inverse), upper = rintf(whole * (1.f / QUERY_STEPS));
      sum += whole;
      high |= u32(int(upper) & 0xFF) << 8 * i, low |= u32(int(whole - upper * QUERY_STEPS) & 0xFF) << 8 * i;
    }
    if (4 * word >= D) continue;
    to.digits[k / 2][row / 4][to_lane][k % 2][word % 2] = high;
    to.digits[k / 2][row / 4][to_lane + 4][k % 2][word % 2] = low;
  }
#pragma unroll
  for (int i = 1; i < 32; i *= 2) sum += across(sum, i), bias += across(bias, i);
  if (lane == 0) to.step[row] = step * scale, to.sum[row] = sum * step * scale, to.bias[row] = bias * scale;
}
