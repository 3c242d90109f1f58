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

// The product of the block's mean with the queries: an operand A whose first eight rows are all the mean. The others
// may be anything.
INLINE void add_mean(const u8* page, const Queries& queries, const u32* mine, float (&shift)[2]) {
  const int lane = threadIdx.x % 32;
  int high[4] = {MAGIC_BITS, MAGIC_BITS, MAGIC_BITS, MAGIC_BITS}, low[4] = {MAGIC_BITS, MAGIC_BITS, MAGIC_BITS, MAGIC_BITS};
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    const u32* z = reinterpret_cast<const u32*>(page + K::CHANNEL_ZERO.offset + lane % 4 * (D / 4) + 16 * u);
#pragma unroll
    for (int y = 0; y < 2; y++) {
      const uint4 b = *reinterpret_cast<const uint4*>(mine + (2 * u + y) * HEADS * 16);
      const u32 a[4] = {z[2 * y], anything(), z[2 * y + 1], anything()};
      mma<true, true>(high, a, b.x, b.y, high);
      mma<true, true>(low, a, b.z, b.w, low);
    }
  }
  const float step = number<FP16>(page + K::CHANNEL_ZERO.step, 0);
#pragma unroll
  for (int j = 0; j < 2; j++) {
    const float whole = (__int_as_float(high[j]) - MAGIC) * QUERY_STEPS + (__int_as_float(low[j]) - MAGIC);
    shift[j] += whole * (step * queries.step[(2 * (lane % 4) + j) % HEADS]);
  }
}

// Scores of a page, relative to `ref`.
INLINE void score(const u8* page, const u32 (&table)[4], const float* sizes, const Queries& queries, const float (&ref)[2],
                  int tokens_left, float (&s)[TOKENS][2]) {
  const int lane = threadIdx.x % 32, row = lane / 4, column = 2 * (lane % 4), group = column / HEADS;
  const int first = 8 * row + TOKENS * group;
  // Operands B of a column group hold its own columns; the other lanes read the zeros behind.
  const u32* mine = &queries.digits[0][row % HEADS][lane % 4][0];
  auto of_group = [&](int i) { return GROUPS == 1 || row / HEADS == i ? mine : queries.nothing; };
  float shift[2] = {-ref[0], -ref[1]};
  if constexpr (MEAN) add_mean(page, queries, mine, shift);
  int high[TILES][4], low[TILES][4];
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int t = 0; t < TILES; t++) high[t][i] = low[t][i] = MAGIC_BITS;
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    const Unit<K::BITS> unit(page + K::CODES + 512 * K::BITS * u + 16 * lane, table);
    uint4 q[2][GROUPS];
#pragma unroll
    for (int y = 0; y < 2; y++)
#pragma unroll
      for (int i = 0; i < GROUPS; i++)
        q[y][i] = *reinterpret_cast<const uint4*>(of_group(i) + (2 * u + y) * HEADS * 16);
#pragma unroll
    for (int x = 0; x < 4; x++) {
      u32 a[Unit<K::BITS>::PARTS][2][4];
      unit.get(x, a);
#pragma unroll
      for (int y = 0; y < 2; y++)
#pragma unroll
        for (int part = 0; part < Unit<K::BITS>::PARTS; part++) {
          const uint4& b = q[y][x / TILES];
          mma<Unit<K::BITS>::SIGNED, true>(high[x % TILES], a[part][y], b.x, b.y, high[x % TILES]);
          mma<Unit<K::BITS>::SIGNED, true>(low[x % TILES], a[part][y], b.z, b.w, low[x % TILES]);
        }
    }
  }
  float scale[TOKENS], zero[TOKENS];
  token_scales<K::SCALE.kind>(page, K::SCALE, first, sizes, scale);
  numbers_of<K::ZERO.kind>(page, K::ZERO, first, 0, zero);
  const float field = K::BITS == 1 ? __uint_as_float(u32(127 - TOKENS * group) << 23) : 1.f;
  float digit[2], less[2], sum[2];
#pragma unroll
  for (int j = 0; j < 2; j++) {
    const int head = (column + j) % HEADS;
    const float step = queries.step[head];
    digit[j] = step * K::STEP;
    less[j] = -MAGIC * digit[j];
    sum[j] = K_ZERO ? queries.sum[head] : 0;
    if constexpr (BY_PAGE) shift[j] += queries.bias[head];
  }
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    const float gain = K::BITS == 1 ? scale[t] * (field * (1.f / (1 << t))) : scale[t];
    const float offset = zero[t] + K::MID * scale[t];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const float upper = __int_as_float(high[t / 2][t % 2 * 2 + j]) - MAGIC;
      const float lower = fmaf(__int_as_float(low[t / 2][t % 2 * 2 + j]), digit[j], less[j]);
      const float dot = fmaf(upper, digit[j] * QUERY_STEPS, lower);
      s[t][j] = fmaf(dot, gain, K_ZERO ? fmaf(offset, sum[j], shift[j]) : shift[j]);
    }
  }
  if (tokens_left < BLOCK)
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
      if (first + t >= tokens_left) s[t][0] = s[t][1] = -INFINITE;
}
