// Joins attention over disjoint tokens: outputs weighted by their share of the exponential mass. A warp for each row.
#include "ptx.cuh"

constexpr int MOST = 8;

struct Arguments {
  const float *out[MOST], *lse[MOST];
  float *whole, *whole_lse;
  i64 rows;
  int count, d;
};

extern "C" __global__ void __launch_bounds__(256) merge(const Arguments a) {
  const i64 row = i64(blockIdx.x) * 8 + threadIdx.x / 32;
  if (row >= a.rows) return;
  float top = -INFINITE, sum = 0, share[MOST];
#pragma unroll
  for (int i = 0; i < MOST; i++) {
    share[i] = i < a.count ? a.lse[i][row] : -INFINITE;
    top = fmaxf(top, share[i]);
  }
#pragma unroll
  for (int i = 0; i < MOST; i++) sum += share[i] = top == -INFINITE ? 0.f : expf(share[i] - top);
  for (int c = threadIdx.x % 32; c < a.d; c += 32) {
    float x = 0;
#pragma unroll
    for (int i = 0; i < MOST; i++)
      if (share[i] > 0) x += share[i] * a.out[i][row * a.d + c];
    a.whole[row * a.d + c] = sum > 0 ? x / sum : 0;
  }
  if (threadIdx.x % 32 == 0) a.whole_lse[row] = sum > 0 ? top + logf(sum) : -INFINITE;
}
