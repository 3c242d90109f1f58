// Encoders that take the nearest entry of a table: see `TableEncoder`. A thread for each token: the rotation and the sums over its
// channels need no other thread. Only the mean of a channel and the order of the codes go through shared memory.
constexpr int THREADS = 64;
#include "nibbles.cuh"
#include "tokens.cuh"

constexpr int CODE_BITS = S::BITS == 8 ? 8 : 4;  // in shared memory, where a token's codes take the place of its values
constexpr int MINE = D / THREADS;           // channels of a thread, when the mean is taken
constexpr float WHOLE = 8388608.f;          // 2^23: added to an integer, it leaves that in the low bits

struct Channels {
  float sum[MINE];
};

// First half of the tokens plus second half, and again.
template <int STEP = 1>
INLINE Channels token_sum(const float* column, int first = 0) {
  Channels a;
  if constexpr (STEP == BLOCK) {
    numbers<FP32>(reinterpret_cast<const u8*>(column + first * WIDTH), 0, a.sum);
  } else {
    a = token_sum<2 * STEP>(column, first);
    const Channels b = token_sum<2 * STEP>(column, first + STEP);
#pragma unroll
    for (int i = 0; i < MINE; i++) a.sum[i] += b.sum[i];
  }
  return a;
}

// The mean of each channel, as it is stored.
INLINE void take_mean(Tokens& s, u8* out) {
  const int first = MINE * threadIdx.x;
  Channels mean = token_sum(s.y[0] + first);
#pragma unroll
  for (int i = 0; i < MINE; i++) mean.sum[i] *= 1.f / BLOCK;
  put_in_steps(s, S::CHANNEL_ZERO, mean.sum, out);
#pragma unroll
  for (int i = 0; i < MINE; i++) s.zero[first + i] = mean.sum[i];
}

// The size next to x of the COUNT in `size`; `level` grows by `place` times its number. One on a threshold is the smaller one.
template <int COUNT>
INLINE float nearest(float x, const float (&threshold)[COUNT], const float (&size)[COUNT], float place, float& level) {
  if constexpr (COUNT == 1) {
    return size[0];
  } else {
    constexpr int HALVES = COUNT / 2;
    const bool above = x > threshold[HALVES - 1];
    if (above) level += HALVES * place;
    float thresholds[HALVES], sizes[HALVES];
#pragma unroll
    for (int i = 0; i < HALVES; i++) {
      thresholds[i] = above ? threshold[HALVES + i] : threshold[i], sizes[i] = above ? size[HALVES + i] : size[i];
    }
    return nearest(x, thresholds, sizes, place, level);
  }
}

// Codes of eight neighbours to a word, or to two; returns what the token's values and entries have in common, lane by lane.
struct Coder {
  float threshold[HALF], size[HALF];
  const float* table;

  INLINE explicit Coder(const float* table) : table(table) {
#pragma unroll
    for (int i = 0; i < (CODE_BITS == 4 ? HALF : 0); i++) threshold[i] = threshold_of(i), size[i] = size_of(i);
  }
  INLINE void few(const float* y, float unit, float* term, u32* word) const {
    float digits[2] = {WHOLE, WHOLE};
    u32 signs = 0;
#pragma unroll
    for (int i = 7; i >= 0; i--) {
      const float z = y[i] * unit;
      signs = __funnelshift_l(__float_as_uint(z + 0.f), signs, 4);  // -0 counts as 0
      term[i] = fabsf(y[i]) * nearest(fabsf(z), threshold, size, float(1 << 4 * (i % 4)), digits[i / 4]);
    }
    const u32 levels = prmt(__float_as_uint(digits[0]), __float_as_uint(digits[1]), 0x5410);
    *word = (levels | HALF * 0x11111111u) ^ (signs >> 3 & 0x11111111u) * (LEVELS - 1);
  }
  INLINE void many(const float* y, float unit, float* term, u32* word) const {
    word[0] = word[1] = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float z = y[i] * unit;
      int level = 0;
#pragma unroll
      for (int step = HALF / 2; step; step /= 2)
        if (__ldg(table + level + step - 1) < fabsf(z)) level += step;
      term[i] = fabsf(y[i]) * __ldg(table + HALF - 1 + level);
      word[i / 4] |= u32(z < 0 ? HALF - 1 - level : HALF + level) << 8 * (i % 4);
    }
  }
};

// <y, entries> of a token whose norm is beyond fp32, so that every entry is the smallest positive one.
INLINE float along_smallest(const float* row, float smallest) {
  float along[LANES] = {};
#pragma unroll 1
  for (int k = 0; k < PARTS; k++) {
    float x[LANES];
    numbers<FP32>(reinterpret_cast<const u8*>(row), LANES * k, x);
#pragma unroll
    for (int i = 0; i < LANES; i++) along[i] += x[i] * smallest;
  }
  return halved(along);
}

// A token's codes; returns <y, entries>. An entry has its value's sign, so that sizes are multiplied.
INLINE float code(float* row, float unit, const float* table) {
  const Coder coder(table);
  float along[LANES] = {};
  const float beyond = unit > 0 ? 0.f : along_smallest(row, __ldg(table + HALF - 1));  // before codes take its place
  u32* to = reinterpret_cast<u32*>(row);
#pragma unroll 1
  for (int k = 0; k < PARTS; k++) {
    float x[LANES], term[LANES];
    u32 word[CODE_BITS / 2];
    numbers<FP32>(reinterpret_cast<const u8*>(row), LANES * k, x);
#pragma unroll
    for (int half = 0; half < 2; half++)
      if constexpr (CODE_BITS == 4) coder.few(x + 8 * half, unit, term + 8 * half, word + half);
      else coder.many(x + 8 * half, unit, term + 8 * half, word + 2 * half);
#pragma unroll
    for (int i = 0; i < CODE_BITS / 2; i++) to[CODE_BITS / 2 * k + i] = word[i];
#pragma unroll
    for (int i = 0; i < LANES; i++) along[i] += term[i];
  }
  const float sum = halved(along);
  return unit > 0 ? sum : beyond;
}

INLINE void pack_block(const CodeRows& rows, u8* out) {
  for (int i = threadIdx.x; i < D / 64 * 32; i += THREADS) {
    const int u = i / 32, lane = i % 32, g = lane / 4, p = lane % 4;
    u32 words[S::BITS][4];
    pack<S::BITS>(rows, u, g, p, words);
#pragma unroll
    for (int v = 0; v < S::BITS; v++)
      *reinterpret_cast<uint4*>(out + S::CODES + 512 * (S::BITS * u + v) + 16 * lane) =
          make_uint4(words[v][0], words[v][1], words[v][2], words[v][3]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) encode(const Arguments a) {
  extern __shared__ __align__(16) u8 memory[];
  Tokens& s = *reinterpret_cast<Tokens*>(memory);
  u8* out = a.out + i64(blockIdx.x) * a.stride;
  float* row = s.y[threadIdx.x];
  load(a, s);
  pad(out);
  __syncthreads();
  float y[CHUNK];
  rotate(row, y);
  if constexpr (MEAN) {
    __syncthreads();
    take_mean(s, out);
    __syncthreads();
  }
  const float energy = energy_of(s, row, y), norm = sqrtf(energy), unit = norm > 0 ? ROOT_D / norm : 0.f;
  const float along = code(row, unit, a.tables);
  put_scale(s, !UNBIASED ? norm * FACTOR : along > 0 ? energy / along : 0.f, a.tables + LEVELS - 1, out);
  __syncthreads();
  pack_block({reinterpret_cast<const u32*>(memory), WIDTH}, out);
}
