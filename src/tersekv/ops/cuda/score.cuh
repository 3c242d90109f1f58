// Keys times queries.
#pragma once
#include "queries.cuh"
#include "unpack.cuh"

// A register of any content, which costs no instruction.
INLINE u32 anything() {
  u32 x;
  asm volatile("" : "=r"(x));
  return x;
}

typedef u32 Columns[UNITS][2][2];  // a lane's operands B of four query rows, one for each 32 channels

// The product of the block's mean with four query rows: an operand A whose first eight rows are all the mean. The others
// may be anything.
INLINE float with_mean(const u8* page, const Columns& q) {
  int sum[4] = {MAGIC_BITS, MAGIC_BITS, MAGIC_BITS, MAGIC_BITS};
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    const u32* z = reinterpret_cast<const u32*>(page + K::CHANNEL_ZERO.offset + threadIdx.x % 4 * (D / 4) + 16 * u);
#pragma unroll
    for (int y = 0; y < 2; y++) {
      const u32 a[4] = {z[2 * y], anything(), z[2 * y + 1], anything()};
      mma<true, true>(sum, a, q[u][y][0], q[u][y][1], sum);
    }
  }
  const float whole = (__int_as_float(sum[0]) - MAGIC) * QUERY_STEPS + (__int_as_float(sum[1]) - MAGIC);
  return whole * number<FP16>(page + K::CHANNEL_ZERO.step, 0);
}

// Products of a page's codes with a lane's rows: [row][token][digit].
INLINE void multiply(const u8* page, const u32 (&table)[4], const Columns (&q)[MINE], int (&sum)[MINE][4][4]) {
  typedef Unit<K::BITS> Codes;
#pragma unroll
  for (int j = 0; j < MINE; j++)
#pragma unroll
    for (int x = 0; x < 4; x++) sum[j][x][0] = sum[j][x][1] = sum[j][x][2] = sum[j][x][3] = MAGIC_BITS;
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    const Codes unit(page + K::CODES + 512 * K::BITS * u + 16 * (threadIdx.x % 32), table);
#pragma unroll
    for (int x = 0; x < 4; x++) {
      u32 a[Codes::PARTS][2][4];
      unit.get(x, a);
#pragma unroll
      for (int y = 0; y < 2; y++)
#pragma unroll
        for (int part = 0; part < Codes::PARTS; part++)
#pragma unroll
          for (int j = 0; j < MINE; j++)
            mma<Codes::SIGNED, true>(sum[j][x], a[part][y], q[j][u][y][0], q[j][u][y][1], sum[j][x]);
    }
  }
}

// Scores of a page, relative to `ref`.
INLINE void score(const u8* page, const u32 (&table)[4], const float* sizes, const Queries& queries,
                  const float (&ref)[MINE], int tokens_left, float (&s)[TOKENS][MINE]) {
  const int lane = threadIdx.x % 32, first = TOKENS * (lane / 4);
  Columns q[MINE];
#pragma unroll
  for (int j = 0; j < MINE; j++)
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
      const uint4 b = *reinterpret_cast<const uint4*>(queries.digits[u][j][lane]);
      q[j][u][0][0] = b.x, q[j][u][0][1] = b.y, q[j][u][1][0] = b.z, q[j][u][1][1] = b.w;
    }
  int product[MINE][4][4];
  multiply(page, table, q, product);
  float scale[TOKENS], zero[TOKENS];
  token_scales<K::SCALE.kind>(page, K::SCALE, first, sizes, scale);
  numbers_of<K::ZERO.kind>(page, K::ZERO, first, 0, zero);
#pragma unroll
  for (int j = 0; j < MINE; j++) {
    const int head = lane % 4 + 4 * j;
    const float step = queries.step[head], digit = step * K::STEP, less = -MAGIC * digit;
    const float sum = K_ZERO ? queries.sum[head] : 0;
    float shift = -ref[j], of_zeros = 0;
    if constexpr (MEAN) of_zeros = with_mean(page, q[j]) * step;
    if constexpr (BY_PAGE) of_zeros += queries.bias[head];
    if constexpr (!K::CHANNELS_FIRST) shift += of_zeros;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      const int* digits = product[j][t / 2] + t % 2 * 2;
      const float gain = K::BITS == 1 ? scale[t] * (1.f / (1 << t)) : scale[t];  // see `Unit<1>`
      const float offset = zero[t] + K::MID * scale[t];
      const float base = K::CHANNELS_FIRST ? fmaf(of_zeros, scale[t], shift) : shift;
      const float lower = fmaf(__int_as_float(digits[1]), digit, less);
      const float dot = fmaf(__int_as_float(digits[0]) - MAGIC, digit * QUERY_STEPS, lower);
      s[t][j] = fmaf(dot, gain, K_ZERO ? fmaf(offset, sum, base) : base);
    }
  }
  if (tokens_left < BLOCK)
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
#pragma unroll
      for (int j = 0; j < MINE; j++)
        if (first + t >= tokens_left) s[t][j] = -INFINITE;
}
