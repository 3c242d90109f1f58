// Codes of tokens one channel after the other, each error passed on to the channels behind: `steered` of ops/feedback.py.
// A block of threads for each block of tokens, four threads a token. Compiled without fused multiply-adds.
#include "planes.cuh"

constexpr int TOKENS = 64, PARTS = 4, WIDTH = TOKENS + 1;

struct Arguments {
  const float* z;       // (blocks, TOKENS, D)
  const float* passed;  // (matrices, D, D)
  const i64* matrix;    // of each block
  const float* tables;  // thresholds (HALF - 1), then positive entries (HALF)
  u8* codes;            // (blocks, TOKENS, D)
};

extern "C" __global__ void __launch_bounds__(TOKENS * PARTS) steer(const Arguments a) {
  extern __shared__ float w[];  // D rows of WIDTH
  __shared__ float thresholds[HALF], entries[HALF];
  const int t = threadIdx.x % TOKENS, part = threadIdx.x / TOKENS;
  const i64 first = i64(blockIdx.x) * TOKENS * D;
  const float* passed = a.passed + a.matrix[blockIdx.x] * D * D;
  for (int i = threadIdx.x; i < TOKENS * D; i += TOKENS * PARTS) w[i % D * WIDTH + i / D] = a.z[first + i];
  for (int i = threadIdx.x; i < HALF; i += TOKENS * PARTS) {
    thresholds[i] = i < HALF - 1 ? a.tables[i] : 0.f;
    entries[i] = a.tables[HALF - 1 + i];
  }
  __syncthreads();
  for (int i = 0; i < D; i++) {
    const float x = w[i * WIDTH + t], size = fabsf(x);
    int level = 0;
    for (int step = HALF / 2; step; step /= 2)
      if (thresholds[level + step - 1] < size) level += step;
    const float error = x - (x < 0 ? -entries[level] : entries[level]);
    if (part == 0) a.codes[first + t * D + i] = u8(x < 0 ? HALF - 1 - level : HALF + level);
    for (int j = i + 1 + part; j < D; j += PARTS) w[j * WIDTH + t] -= __ldg(passed + i * D + j) * error;
    __syncthreads();
  }
}
