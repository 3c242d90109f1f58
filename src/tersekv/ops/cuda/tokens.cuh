// A block's tokens in shared memory, a row each, and what encoders do with a token by one thread: rotation and sums over its
// channels. THREADS, a multiple of BLOCK, stands before this text.
#pragma once
#include "blocks.cuh"

constexpr int CHUNK = D < 128 ? D : 128;  // channels that registers hold
constexpr bool HELD = D == CHUNK, MEAN = S::CHANNEL_ZERO.kind != NONE;
constexpr int WIDTH = D + 4;                // of a token's row: eight of them meet no bank twice

struct Tokens {
  float y[BLOCK][WIDTH];
  float zero[MEAN ? D : 1], largest[2];
};

INLINE void load(const Arguments& a, Tokens& s) {
  constexpr int PIECES = D * (INPUT == FP32 ? 4 : 2) / 16, ROWS = THREADS / PIECES;  // 16 bytes each; rows at a time
  const uint4* from = reinterpret_cast<const uint4*>(a.x) + i64(blockIdx.x) * BLOCK * PIECES + threadIdx.x;
  uint4* to = reinterpret_cast<uint4*>(s.y[threadIdx.x / PIECES]) + threadIdx.x % PIECES;
  const u8* later = a.x + (i64(blockIdx.x) + a.ahead) * sizeof(uint4) * BLOCK * PIECES;
  if (blockIdx.x + a.ahead < gridDim.x)
    for (int i = 128 * threadIdx.x; i < sizeof(uint4) * BLOCK * PIECES; i += 128 * THREADS) prefetch(later + i);
#pragma unroll 16
  for (int turn = 0; turn < BLOCK / ROWS; turn++) to[turn * ROWS * WIDTH / 4] = __ldg(from + turn * THREADS);
}

template <int COUNT>
INLINE void put(float* to, const float (&x)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i += 4)
    *reinterpret_cast<uint4*>(to + i) = make_uint4(__float_as_uint(x[i]), __float_as_uint(x[i + 1]),
                                                   __float_as_uint(x[i + 2]), __float_as_uint(x[i + 3]));
}

// From a token's row of inputs to its rotated values: `y` holds those of the first chunk, the row all of them.
INLINE void rotate(float* row, float (&y)[CHUNK]) {
#pragma unroll
  for (int chunk = D / CHUNK - 1; chunk >= 0; chunk--) {  // 16-bit inputs of the first lie where its values come to lie
    float x[CHUNK];
    numbers<INPUT>(reinterpret_cast<const u8*>(row), CHUNK * chunk, x);
    if constexpr (ROTATED) {
#pragma unroll
      for (int i = 0; i < CHUNK; i++) x[i] = minus(CHUNK * chunk + i) ? -x[i] : x[i];
      butterflies(x);
      if constexpr (HELD)
#pragma unroll
        for (int i = 0; i < CHUNK; i++) x[i] *= SIZE_ROOT;
    }
    if constexpr (MEAN || !HELD) put(row + CHUNK * chunk, x);
#pragma unroll
    for (int i = 0; i < CHUNK; i++) y[i] = x[i];
  }
  if constexpr (ROTATED && !HELD)  // the last stride
#pragma unroll 4
    for (int i = 0; i < CHUNK; i += 4) {
      float low[4], high[4];
      numbers<FP32>(reinterpret_cast<const u8*>(row), i, low);
      numbers<FP32>(reinterpret_cast<const u8*>(row), CHUNK + i, high);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float sum = low[j] + high[j], difference = low[j] - high[j];
        low[j] = sum * SIZE_ROOT, high[j] = difference * SIZE_ROOT;
      }
      put(row + i, low);
      put(row + CHUNK + i, high);
    }
}

// The sum over a token's lanes: first half plus second half, and again.
template <int COUNT = LANES>
INLINE float halved(float (&x)[LANES]) {
  if constexpr (COUNT == 1) return x[0];
  else {
#pragma unroll
    for (int i = 0; i < COUNT / 2; i++) x[i] += x[i + COUNT / 2];
    return halved<COUNT / 2>(x);
  }
}

// |y|^2 of a token whose values are in registers or in its row; the mean is taken off, and the row holds what is left.
INLINE float energy_of(const Tokens& s, float* row, float (&y)[CHUNK]) {
  float sum[LANES] = {};
#pragma unroll(HELD ? PARTS : 1)
  for (int k = 0; k < PARTS; k++) {
    float x[LANES];
    if constexpr (HELD)
#pragma unroll
      for (int i = 0; i < LANES; i++) x[i] = y[LANES * k + i];
    else numbers<FP32>(reinterpret_cast<const u8*>(row), LANES * k, x);
    if constexpr (MEAN) {
      float zero[LANES];
      numbers<FP32>(reinterpret_cast<const u8*>(s.zero), LANES * k, zero);
#pragma unroll
      for (int i = 0; i < LANES; i++) x[i] -= zero[i];
    }
    if constexpr (MEAN || HELD) put(row + LANES * k, x);
#pragma unroll
    for (int i = 0; i < LANES; i++) sum[i] += x[i] * x[i];
  }
  return halved(sum);
}

// Numbers of a plane, COUNT of each of the first BLOCK threads, as 8 bits with one step. Each becomes what it is stored as.
template <int COUNT>
INLINE void put_in_steps(Tokens& s, Plane plane, float (&x)[COUNT], u8* out) {
  float top = 0;
#pragma unroll
  for (int i = 0; i < COUNT; i++) top = fmaxf(top, fabsf(x[i]));
#pragma unroll
  for (int i = 1; i < 32; i *= 2) top = fmaxf(top, across(top, i));
  if (threadIdx.x < BLOCK && threadIdx.x % 32 == 0) s.largest[threadIdx.x / 32] = top;
  __syncthreads();
  const u16 half = to_half(fmaxf(s.largest[0], s.largest[1]) * float(1.0 / 127));
  const float step = half_to_float(half), inverse = step > 0 ? 1.f / step : 0.f;
  if (threadIdx.x == 0) *reinterpret_cast<uint4*>(out + plane.step) = make_uint4(half, 0, 0, 0);
  if (threadIdx.x < BLOCK)
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      const float steps = fminf(fmaxf(rintf(x[i] * inverse), -127.f), 127.f);
      out[plane.offset + COUNT * threadIdx.x + i] = u8(int(steps));
      x[i] = steps * step;
    }
}

// The scale of the thread's token; threads from BLOCK on have none.
INLINE void put_scale(Tokens& s, float scale, const float* edges, u8* out) {
  float x[1] = {scale};
  if constexpr (S::SCALE.kind == INT8) put_in_steps(s, S::SCALE, x, out);
  else if (threadIdx.x < BLOCK) store<S::SCALE.kind>(out + S::SCALE.offset, threadIdx.x, scale, edges);
}
