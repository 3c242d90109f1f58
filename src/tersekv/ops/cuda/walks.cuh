// Weights times values of a trellis. A look-up gives four channels of one token, so the depth of a matrix product is eight tokens
// by four channels, and its columns are two heads by four channels: a weight stands where the channels are the same, else 0.
#pragma once
#include "softmax.cuh"
#include "trellis.cuh"

template <bool TRELLIS>
struct WalksOf {  // in shared memory; nothing for a grid
  alignas(16) u8 windows[Windows<V::BITS>::BYTES];
  alignas(16) u8 weights[WARPS][HEADS][BLOCK];
  INLINE void copy(const uint4* from) {
#pragma unroll 8
    for (int i = threadIdx.x; i < sizeof(windows) / 16; i += THREADS) reinterpret_cast<uint4*>(windows)[i] = __ldg(from + i);
  }
};
template <>
struct WalksOf<false> {
  INLINE void copy(const uint4*) {}
};

struct WalkTables {
  const u8* windows;
  u8 (*weights)[BLOCK];  // of this warp: [head][token]
  INLINE WalkTables(WalksOf<true>& from, int warp) : windows(from.windows), weights(from.weights[warp]) {}
  INLINE WalkTables(WalksOf<false>&, int) {}
};

INLINE void put_weights(const u32 (&byte)[TOKENS][MINE], const WalkTables& walks, int lane) {
#pragma unroll
  for (int j = 0; j < MINE; j++) {
    u32 two[TOKENS / 2];
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) two[i] = prmt(byte[2 * i][j], byte[2 * i + 1][j], 0x0040);
    *reinterpret_cast<uint2*>(walks.weights[lane % 4 + 4 * j] + TOKENS * (lane / 4)) =
        make_uint2(prmt(two[0], two[1], 0x5410), prmt(two[2], two[3], 0x5410));
  }
  __syncwarp();
}

INLINE void mix_walks(const u8* page, const u32 (&byte)[TOKENS][MINE], const WalkTables& walks, Softmax& softmax) {
  int lane = threadIdx.x % 32;
  asm volatile("" : "+r"(lane));  // what depends on it is found anew for each page: registers are few
  const int place = 4 * (lane / 4 % 4);
  put_weights(byte, walks, lane);
  u32 weights[HEADS / 2][4], choose[4];  // choose: byte i of a word at the column's channel, zeros elsewhere
  float gain[HEADS / 2];
  Softmax::of_heads(softmax.gain, gain);
#pragma unroll
  for (int j = 0; j < HEADS / 2; j++) {
    const uint4 v = *reinterpret_cast<const uint4*>(walks.weights[2 * j + lane / 16] + 16 * (lane % 4));
    weights[j][0] = v.x, weights[j][1] = v.y, weights[j][2] = v.z, weights[j][3] = v.w;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) choose[i] = (0x4444u & ~(15u << place)) | u32(i) << place;
  const u8* codes = page + V::CODES + 16 * lane;
  Walks<V::BITS> walk;
  walk.load(V::BITS, vector_before<V>(codes, 0));
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
#pragma unroll
    for (int i = 0; i < 4; i++) walk.bytes[0][i] = walk.bytes[V::BITS][i];
#pragma unroll
    for (int i = 0; i < V::BITS; i++) walk.load(i + 1, vector(codes, V::BITS * u + i));
    int sum[HEADS / 2][4];
#pragma unroll
    for (int j = 0; j < HEADS / 2; j++) sum[j][0] = sum[j][1] = sum[j][2] = sum[j][3] = MAGIC_BITS;
#pragma unroll
    for (int t = 0; t < 8; t++) {
      u32 a[4];
      walk.get(t, walks.windows, a);
#pragma unroll
      for (int j = 0; j < HEADS / 2; j++) {
        const u32 word = weights[j][t / 2];
        mma<true, false>(sum[j], a, prmt(word, 0, choose[t % 2 * 2]), prmt(word, 0, choose[t % 2 * 2 + 1]), sum[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < HEADS / 2; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float& out = softmax.out[HEADS / 2 * u + j][i / 2][i % 2];
        out = fmaf(__int_as_float(sum[j][i]) - MAGIC, gain[j], out);
      }
  }
}
