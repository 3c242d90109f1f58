// Weights times values.
#pragma once
#include "softmax.cuh"
#include "walks.cuh"

// Weighs the values of a page and adds them up.
INLINE void mix(const u8* page, const u32 (&table)[4], const WalkTables& walks, const float* sizes, int tokens_left,
                float (&s)[TOKENS][MINE], Softmax& softmax) {
  const int lane = threadIdx.x % 32, first = TOKENS * (lane / 4);
  float scale[TOKENS], offset[TOKENS];
  token_scales<V::SCALE.kind>(page, V::SCALE, first, sizes, scale);
  numbers_of<V::ZERO.kind>(page, V::ZERO, first, 0, offset);
  // What all channels share is a multiple of the exponentials as they are; rounded weights multiply only what is centred,
  // so that their rounding errors do not add up.
#pragma unroll
  for (int t = 0; t < TOKENS; t++) offset[t] += (V::MID - V::CENTRE) * scale[t];
  if (tokens_left < BLOCK)
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
      if (first + t >= tokens_left) scale[t] = offset[t] = 0;
  u32 byte[TOKENS][MINE], b[4];
  softmax.weigh(s, scale, offset, byte);
  if constexpr (V::TRELLIS) return mix_walks(page, byte, walks, softmax);
  columns(byte, b);
  float middle[MINE] = {};
  if constexpr (V::CENTRE != 0) {  // times the sum of the weights as they were rounded
    const u32 ones[4] = {0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u};
    int all[4] = {MAGIC_BITS, MAGIC_BITS, MAGIC_BITS, MAGIC_BITS};
    mma<false, false>(all, ones, b[0], b[1], all);
    mma<false, false>(all, ones, b[2], b[3], all);
#pragma unroll
    for (int j = 0; j < MINE; j++) middle[j] = (__int_as_float(all[j]) - MAGIC) * softmax.gain[j] * V::CENTRE;
  }
#pragma unroll
  for (int j = 0; j < MINE; j++)
    if constexpr (V_CHANNELS) middle[j] += softmax.page_zero[j];
    else softmax.middle[j] += middle[j];
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    const Unit<V::BITS> unit(page + V::CODES + 512 * V::BITS * u + 16 * lane, table);
#pragma unroll
    for (int x = 0; x < 4; x++) {
      u32 a[Unit<V::BITS>::PARTS][2][4];
      unit.get(x, a);
      int sum[4] = {MAGIC_BITS, MAGIC_BITS, MAGIC_BITS, MAGIC_BITS};
#pragma unroll
      for (int part = 0; part < Unit<V::BITS>::PARTS; part++) {
        mma<Unit<V::BITS>::SIGNED, false>(sum, a[part][0], b[0], b[1], sum);
        mma<Unit<V::BITS>::SIGNED, false>(sum, a[part][1], b[2], b[3], sum);
      }
      float gain[2] = {1, 1}, zero[2] = {0, 0};
      if constexpr (V_CHANNELS) {
        const int c = ROWS * (lane / 4) + 8 * u + 2 * x;
        numbers_of<V::CHANNEL_SCALE.kind>(page, V::CHANNEL_SCALE, c, 1, gain);
        numbers_of<V::CHANNEL_ZERO.kind>(page, V::CHANNEL_ZERO, c, 0, zero);
      }
#pragma unroll
      for (int i = 0; i < 2 * MINE; i++) {
        const int half = i / MINE, j = i % MINE;
        float& out = softmax.out[4 * u + x][half][j];
        const float value = __int_as_float(sum[2 * half + j]) - MAGIC;
        if constexpr (V_CHANNELS) {
          const float factor = V::STEP * (V::BITS == 1 ? 1.f / (1 << (2 * x + half)) : 1.f);
          out += (value * softmax.gain[j] * factor + middle[j]) * gain[half];
          out += zero[half] * softmax.page_mass[j];
        } else {
          out = fmaf(value, softmax.gain[j], out);
        }
      }
    }
  }
}
