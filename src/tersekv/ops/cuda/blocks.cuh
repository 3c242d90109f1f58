// Blocks of 64 tokens to pages: what the encoders share. They are compiled without fused multiply-adds, and every sum has the
// order of ops/sums.py. Constants: see encoding.py.
#pragma once
#include "rows.cuh"

constexpr int LANES = 16;         // in which channels are summed
constexpr int PARTS = D / LANES;  // channels of a lane
constexpr int LEVELS = 1 << S::BITS, HALF = LEVELS / 2;

struct Arguments {
  const u8* x;          // (blocks, BLOCK, D)
  const float* tables;  // thresholds (HALF - 1) and sizes (HALF) of a table, edges of the logarithmic scale (254)
  u8* out;
  i64 stride;  // of the blocks in `out`
  int ahead;   // blocks that are under way at a time
};

INLINE u16 to_half(float x) {
  u16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(fminf(fmaxf(x, -65504.f), 65504.f)));
  return y;
}

// A logarithm that may be off by a part of a step says which two edges to compare with.
INLINE u32 log8_code(float x, const float* edges) {
  const int guess = __float2int_rn(fmaf(log2_fast(x), 12.f, 142.f)), below = guess < 0 ? 0 : guess > 252 ? 252 : guess;
  const float first = __ldg(edges + below), second = __ldg(edges + below + 1);
  return x >= LOG8_FLOOR ? below + 1 + (first < x) + (second < x) : 0;
}

// Zeros behind the last plane, so that equal content has equal bytes.
INLINE void pad(u8* out) {
  const int i = S::USED + 16 * threadIdx.x;
  if (i < S::BYTES) *reinterpret_cast<uint4*>(out + i) = make_uint4(0, 0, 0, 0);
}

template <int KIND>
INLINE void store(u8* plane, int i, float x, const float* edges) {
  if constexpr (KIND == FP32) reinterpret_cast<float*>(plane)[i] = fminf(fmaxf(x, -3.4028234663852886e38f), 3.4028234663852886e38f);
  else if constexpr (KIND == FP16) reinterpret_cast<u16*>(plane)[i] = to_half(x);
  else plane[i] = u8(log8_code(x, edges));
}
