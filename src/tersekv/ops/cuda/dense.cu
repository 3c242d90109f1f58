// Attention of a few query rows over a few dense tokens, in fp32: sinks, recent tokens, a chunk's own. A block for each
// KV head and ROWS query rows. Constants: D, Q_KIND, KV_KIND, ROWS, CAUSAL.
#include "planes.cuh"

constexpr int THREADS = 256, TILE = THREADS;  // tokens at a time: one for each thread
constexpr int PARTS = THREADS / D;            // of the tokens, when values are added up: a thread for each channel
constexpr float LOG2E = 1.4426950408889634f;

struct Arguments {
  const u8 *q, *k, *v;  // (b, hq, n, D), (b, h, t, D), (b, h, t, D)
  const i64 *lengths, *padding;  // (b, h), (b); null: t, 0
  float *out, *lse;
  i64 k_strides[3], v_strides[3];  // bytes between sequences, heads, tokens
  int heads, rows, n, t;           // KV heads, query rows of each, new tokens, tokens
  float scale;
};

struct Shared {
  float q[ROWS][D], weight[ROWS][TILE], out[PARTS][ROWS][D];
  float top[ROWS], mass[ROWS], fade[ROWS];
};

// Row r of a head is query r % n, which sees its own token and those before it.
INLINE int seen(const Arguments& a, int row, int length) { return CAUSAL ? length - a.n + row % a.n + 1 : length; }

INLINE void score(const Arguments& a, Shared& s, const u8* k, int token, int first, int length, int row0) {
  float dot[ROWS] = {};
  if (token < length) {
    constexpr int COUNT = 16 / (KV_KIND == FP32 ? 4 : 2);
#pragma unroll 4
    for (int c = 0; c < D; c += COUNT) {
      float x[COUNT];
      numbers<KV_KIND>(k + token * a.k_strides[2], c, x);
#pragma unroll
      for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int i = 0; i < COUNT; i++) dot[r] += x[i] * s.q[r][c + i];
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const bool visible = token >= first && token < length && token < seen(a, row0 + r, length);
    s.weight[r][threadIdx.x] = visible ? dot[r] * a.scale * LOG2E : -INFINITE;
  }
}

// Running maximum and sum of each row, one warp a row.
INLINE void normalise(Shared& s) {
  const int lane = threadIdx.x % 32;
  for (int r = threadIdx.x / 32; r < ROWS; r += THREADS / 32) {
    float top = s.top[r], sum = 0;
    __syncwarp();  // all lanes have read what the first one replaces
    for (int i = lane; i < TILE; i += 32) top = fmaxf(top, s.weight[r][i]);
#pragma unroll
    for (int i = 1; i < 32; i *= 2) top = fmaxf(top, across(top, i));
    const float reference = top == -INFINITE ? 0.f : top;
    for (int i = lane; i < TILE; i += 32) {
      const float p = exp2_fast(s.weight[r][i] - reference);
      s.weight[r][i] = p, sum += p;
    }
#pragma unroll
    for (int i = 1; i < 32; i *= 2) sum += across(sum, i);
    if (lane == 0) {
      s.fade[r] = exp2_fast(s.top[r] - reference);
      s.mass[r] = s.mass[r] * s.fade[r] + sum, s.top[r] = top;
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) attend_dense(const Arguments a) {
  extern __shared__ __align__(16) u8 memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  const int head = blockIdx.y, sequence = head / a.heads, row0 = blockIdx.x * ROWS;
  const int length = a.lengths ? int(a.lengths[head]) : a.t, first = a.padding ? int(a.padding[sequence]) : 0;
  const u8* k = a.k + sequence * a.k_strides[0] + head % a.heads * a.k_strides[1];
  const u8* v = a.v + sequence * a.v_strides[0] + head % a.heads * a.v_strides[1];
  const i64 at = i64(head) * a.rows + row0;
  for (int i = threadIdx.x; i < ROWS * D; i += THREADS)
    s.q[i / D][i % D] = row0 + i / D < a.rows ? number<Q_KIND>(a.q, int(at * D + i)) : 0;
  if (threadIdx.x < ROWS) s.top[threadIdx.x] = -INFINITE, s.mass[threadIdx.x] = 0;
  const int c = threadIdx.x % D, part = threadIdx.x / D;
  float out[ROWS] = {};
  for (int start = 0; start < length; start += TILE) {
    __syncthreads();
    score(a, s, k, start + threadIdx.x, first, length, row0);
    __syncthreads();
    normalise(s);
    __syncthreads();
    const int count = length - start < TILE ? length - start : TILE;
#pragma unroll
    for (int r = 0; r < ROWS; r++) out[r] *= s.fade[r];
#pragma unroll 4
    for (int i = part; i < count; i += PARTS) {
      if (start + i < first) continue;
      const float x = number<KV_KIND>(v + i64(start + i) * a.v_strides[2], c);
#pragma unroll
      for (int r = 0; r < ROWS; r++)
        if (!CAUSAL || s.weight[r][i] > 0) out[r] += s.weight[r][i] * x;
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) s.out[part][r][c] = out[r];
  __syncthreads();
  for (int i = threadIdx.x; i < ROWS * D; i += THREADS) {
    const int r = i / D;
    if (row0 + r >= a.rows) break;
    float sum = 0;
    for (int p = 0; p < PARTS; p++) sum += s.out[p][r][i % D];
    a.out[at * D + i] = s.mass[r] > 0 ? sum / s.mass[r] : 0;
    if (i % D == 0) a.lse[at + r] = s.mass[r] > 0 ? (s.top[r] + log2f(s.mass[r])) / LOG2E : -INFINITE;
  }
}
