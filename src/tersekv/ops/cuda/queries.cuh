// Query rows as 8-bit integers, two to a number.
#pragma once
#include "sizes.cuh"

// Query rows in two 8-bit digits, as operands B. Columns 2h and 2h + 1 are the high and the low digit of row h of four.
struct __align__(16) Queries {
  u32 digits[UNITS][MINE][32][2][2];  // [unit][four rows][lane][half of the unit][register]
  float step[HEADS], sum[HEADS], bias[HEADS];  // of a low digit; of the rounded query; of the channel zeros
};
constexpr int QUERIES = BY_PAGE ? WARPS : 1;

// The low bytes of four words.
INLINE u32 low_bytes(const u32 (&x)[4]) { return prmt(prmt(x[0], x[1], 0x0040), prmt(x[2], x[3], 0x0040), 0x5410); }

// Four numbers of up to 127 * QUERY_STEPS in size, in two digits each, a byte for each number. Adding MAGIC rounds, which
// conversions to integers and back do at a quarter of the speed.
INLINE void digits_of(const float (&x)[4], float inverse, u32& high, u32& low) {
  u32 upper[4], lower[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float whole = fmaf(x[i], inverse, MAGIC) - MAGIC, top = fmaf(whole, 1.f / QUERY_STEPS, MAGIC);
    upper[i] = __float_as_uint(top), lower[i] = __float_as_uint(fmaf(top - MAGIC, -QUERY_STEPS, whole) + MAGIC);
  }
  high = low_bytes(upper), low = low_bytes(lower);
}

// Sums over a warp: lanes 8 i.. get that of x[i].
INLINE float sum_of_four(const float (&x)[4]) {
  const bool second = threadIdx.x & 16, odd = threadIdx.x & 8;
  const float even = (second ? x[2] : x[0]) + across(second ? x[0] : x[2], 16);
  const float other = (second ? x[3] : x[1]) + across(second ? x[1] : x[3], 16);
  float sum = (odd ? other : even) + across(odd ? even : other, 8);
#pragma unroll
  for (int i = 4; i; i /= 2) sum += across(sum, i);
  return sum;
}

// COUNT query rows, `stride` apart, as the lanes of a warp hold them.
template <int COUNT>
struct QueryRows {
  static constexpr int WORDS = (D / 4 + 31) / 32;
  float x[COUNT][WORDS][4];
  static INLINE int channel(int word) { return 4 * (threadIdx.x % 32 + 32 * word); }
  INLINE void load(const float* from, int stride = 0) {
#pragma unroll
    for (int r = 0; r < COUNT; r++)
#pragma unroll
      for (int w = 0; w < WORDS; w++) {
        const int c = channel(w);
        const float4 four = c < D ? *reinterpret_cast<const float4*>(from + r * stride + c) : make_float4(0, 0, 0, 0);
        x[r][w][0] = four.x, x[r][w][1] = four.y, x[r][w][2] = four.z, x[r][w][3] = four.w;
      }
  }
  INLINE void store(float* to) const {  // of one row
#pragma unroll
    for (int w = 0; w < WORDS; w++)
      if (const int c = channel(w); c < D) *reinterpret_cast<float4*>(to + c) = make_float4(x[0][w][0], x[0][w][1], x[0][w][2], x[0][w][3]);
  }
};

// Rows `first`.. by one warp: (q * channel_scale) in two digits, its sum, and, of four, q * channel_zero, both in units of
// log2. From `rows` on they count nothing.
template <int COUNT>
INLINE void quantise(const QueryRows<COUNT>& q, const u8* page, int rows, float scale, int first, Queries& to) {
  constexpr int WORDS = QueryRows<COUNT>::WORDS;
  const int lane = threadIdx.x % 32;
  float x[COUNT][WORDS][4], top[COUNT] = {}, bias[COUNT] = {};
#pragma unroll
  for (int w = 0; w < WORDS; w++) {
    const int c = QueryRows<COUNT>::channel(w);
    float gain[4] = {1, 1, 1, 1}, zero[4] = {};
    if constexpr (BY_PAGE)
      if (c < D) {
        numbers_of<K::CHANNEL_SCALE.kind>(page, K::CHANNEL_SCALE, c, 1, gain);
        numbers_of<K::CHANNEL_ZERO.kind>(page, K::CHANNEL_ZERO, c, 0, zero);
      }
#pragma unroll
    for (int r = 0; r < COUNT; r++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        bias[r] += q.x[r][w][i] * zero[i], x[r][w][i] = q.x[r][w][i] * gain[i];
        top[r] = fmaxf(top[r], fabsf(x[r][w][i]));
      }
  }
#pragma unroll
  for (int r = 0; r < COUNT; r++) {
    const int row = first + r;
    const float largest = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(top[r])));  // as integers they have this order
    const float inverse = largest > TINY ? 127.f * QUERY_STEPS * reciprocal(largest) : 0;
    const float step = row < rows ? largest * (1.f / (127.f * QUERY_STEPS)) * scale : 0;
    int sum = 0;
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
      const int word = lane + 32 * w, to_lane = 8 * (row % 4) + word / (D / 16), k = word % (D / 16) / 2;
      u32 high, low;
      digits_of(x[r][w], inverse, high, low);
      sum += __dp4a(int(high), 0x01010101, 0) * int(QUERY_STEPS) + __dp4a(int(low), 0x01010101, 0);
      if (4 * word >= D) continue;
      to.digits[k / 2][row / 4][to_lane][k % 2][word % 2] = high;
      to.digits[k / 2][row / 4][to_lane + 4][k % 2][word % 2] = low;
    }
    if constexpr (K_ZERO) sum = __reduce_add_sync(~0u, sum);
    if (lane == 0) to.step[row] = step, to.sum[row] = sum * step;
  }
  if constexpr (COUNT == 4) {
    const float sum = sum_of_four(bias);
    if (lane % 8 == 0) to.bias[first + lane / 8] = first + lane / 8 < rows ? sum * scale : 0;
  }
}
