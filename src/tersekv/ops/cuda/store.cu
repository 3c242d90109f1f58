// The first launch of a decoding step, a block for each sequence and KV head: new keys and values into the ring of dense
// tokens, queries to fp32 in the domain of the packed keys. Constants: D, KIND, ROTATED, SIZE_ROOT.
#include "rows.cuh"
#include "waiting.cuh"

struct Arguments {
  const u8 *q, *k, *v;  // (b, hq, n, D), (b, h, n, D), (b, h, n, D)
  const float* before;  // (1 or b h, D): what channels of queries are multiplied by before the rotation
  float* folded;        // (b, hq, n, D)
  u8 *ring_k, *ring_v;  // (b h, slots, D)
  u8* ring_q;           // (b h, slots, group, D), or null
  int *next, *bad;      // (b h): the number of the next token; 1 once a token was not finite
  i64 q_strides[3], k_strides[3], v_strides[3];  // bytes between sequences, heads, tokens
  int heads, group, n, slots;                    // KV heads, query heads of each, new tokens, tokens of a ring
  int each_row;                                  // 0 or D: from one row of `before` to the next
};

constexpr int COUNT = D / 32, SIZE = KIND == FP32 ? 4 : 2;

INLINE void fold(const u8* from, const float* before, float* to) {
  const int first = threadIdx.x % 32 * COUNT;
  float x[COUNT];
  load_row<KIND>(from, first, x);
  if constexpr (ROTATED) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) x[i] *= before[first + i];
    hadamard(x);
#pragma unroll
    for (int i = 0; i < COUNT; i++) x[i] *= SIZE_ROOT;
  }
#pragma unroll
  for (int i = 0; i < COUNT; i++) to[first + i] = x[i];
}

// A row as it is; whether all of it is finite.
INLINE bool copy(const u8* from, u8* to) {
  const int first = threadIdx.x % 32 * COUNT;
  float x[COUNT];
  load_row<KIND>(from, first, x);
  bool finite = true;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    finite &= fabsf(x[i]) < INFINITE;
    if constexpr (KIND == FP32) reinterpret_cast<float*>(to)[first + i] = x[i];
    else reinterpret_cast<u16*>(to)[first + i] = reinterpret_cast<const u16*>(from)[first + i];
  }
  return finite;
}

extern "C" __global__ void __launch_bounds__(256) store(const Arguments a) {
  let_next_launch();
  const int row = blockIdx.x, sequence = row / a.heads, head = row % a.heads, queries = a.group * a.n;
  const int before = a.next[row];
  for (int i = threadIdx.x / 32; i < queries + 2 * a.n; i += 8) {
    if (i < queries) {
      const int query = head * a.group + i / a.n;
      const u8* from = a.q + sequence * a.q_strides[0] + query * a.q_strides[1] + i % a.n * a.q_strides[2];
      fold(from, a.before + row * a.each_row, a.folded + (i64(row) * queries + i) * D);
      const i64 slot = i64(row) * a.slots + (before + i % a.n) % a.slots;
      if (a.ring_q) copy(from, a.ring_q + (slot * a.group + i / a.n) * D * SIZE);
    } else {
      const int token = (i - queries) / 2;
      const bool keys = (i - queries) % 2 == 0;
      const i64* strides = keys ? a.k_strides : a.v_strides;
      const u8* from = (keys ? a.k : a.v) + sequence * strides[0] + head * strides[1] + token * strides[2];
      const i64 slot = i64(row) * a.slots + (before + token) % a.slots;
      if (!copy(from, (keys ? a.ring_k : a.ring_v) + slot * D * SIZE)) *a.bad = 1;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) a.next[row] = before + a.n;
}
