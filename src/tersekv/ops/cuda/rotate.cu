// y = H (x * signs), or y = H x * signs if BACK; H orthonormal. A warp for each row. Compiled without fused multiply-adds.
#include "rows.cuh"

struct Arguments {
  const u8* x;
  const float* signs;
  float* y;
  i64 rows;
};

extern "C" __global__ void __launch_bounds__(256) rotate(const Arguments a) {
  constexpr int COUNT = D / 32, SIZE = INPUT == FP32 ? 4 : 2;
  const i64 row = i64(blockIdx.x) * 8 + threadIdx.x / 32;
  if (row >= a.rows) return;
  const int first = threadIdx.x % 32 * COUNT;
  float x[COUNT];
  load_row<INPUT>(a.x + row * D * SIZE, first, x);
#pragma unroll
  for (int i = 0; i < COUNT; i++)
    if (!BACK) x[i] *= a.signs[first + i];
  hadamard(x);
#pragma unroll
  for (int i = 0; i < COUNT; i++) a.y[row * D + first + i] = BACK ? x[i] * SIZE_ROOT * a.signs[first + i] : x[i] * SIZE_ROOT;
}
