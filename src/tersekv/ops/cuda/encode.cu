// Whole blocks of 64 tokens to pages: the bytes of the codecs' own `encode`. A block of threads for each block of tokens.
// Compiled without fused multiply-adds; every sum has the order of ops/sums.py. Constants: see encoding.py.
#include "pack.cuh"
#include "rows.cuh"

enum Method : int { TABLE, BY_TOKEN, BY_CHANNEL };

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int LANES = 16;           // in which channels are summed
constexpr int PARTS = D / LANES;    // channels of a lane
constexpr int GROUP = LANES + 4;       // floats of 16 channels in shared memory: rows of them are in different banks,
constexpr int WIDTH = PARTS * GROUP + LANES;  // and so are the rows of two tokens
constexpr int CODE_WIDTH = KEYS ? D + 4 : BLOCK + 4;  // rows of codes: tokens of keys, channels of values
constexpr int CODE_ROWS = KEYS ? BLOCK : D;
constexpr int LEVELS = 1 << S::BITS, HALF = LEVELS / 2;
constexpr bool MEAN = METHOD == TABLE && S::CHANNEL_ZERO.kind != NONE;

struct Arguments {
  const u8* x;          // (blocks, BLOCK, D)
  const float* tables;  // signs (D), thresholds (HALF - 1), centroids (LEVELS), edges of the logarithmic scale (254)
  u8* out;
  i64 stride;  // of the blocks in `out`
};

struct Shared {
  float y[BLOCK][WIDTH];
  float zero[D], inverse[D];
  float thresholds[HALF], centroids[LEVELS];
  float largest[WARPS];
  float energy[BLOCK], along[BLOCK], unit[BLOCK];  // of tokens
  u8 codes[CODE_ROWS][CODE_WIDTH];
};

INLINE u16 to_half(float x) {
  u16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(fminf(fmaxf(x, -65504.f), 65504.f)));
  return y;
}

INLINE int at(int channel) { return channel + channel / LANES * (GROUP - LANES); }

// First half plus second half, and again.
template <int STEP = 1>
INLINE float token_sum(const float* column, int first = 0) {
  if constexpr (STEP == BLOCK) return column[first * WIDTH];
  else return token_sum<2 * STEP>(column, first) + token_sum<2 * STEP>(column, first + STEP);
}

// Over the 16 lanes that share a token.
INLINE float halved(float x) {
  x += across(x, 8);
  x += across(x, 4);
  x += across(x, 2);
  return x + across(x, 1);
}

INLINE u32 log8_code(float x, const float* edges) {
  int below = 0;  // edges below x
#pragma unroll
  for (int step = 128; step; step /= 2)
    if (below + step <= 254 && edges[below + step - 1] < x) below += step;
  return x >= LOG8_FLOOR ? below + 1 : 0;
}

template <int KIND>
INLINE void store(u8* plane, int i, float x, const float* edges) {
  if constexpr (KIND == FP32) reinterpret_cast<float*>(plane)[i] = fminf(fmaxf(x, -3.4028234663852886e38f), 3.4028234663852886e38f);
  else if constexpr (KIND == FP16) reinterpret_cast<u16*>(plane)[i] = to_half(x);
  else plane[i] = u8(log8_code(x, edges));
}

// The nearest entries of an odd-symmetric table. A value on a threshold goes to the smaller magnitude.
struct Nearest {
  static constexpr bool FEW = HALF <= 8;  // thresholds are held and all compared with, otherwise searched
  float threshold[FEW ? HALF : 1], size[FEW ? HALF : 1];
  const Shared& s;

  INLINE explicit Nearest(const Shared& s) : s(s) {
    if constexpr (FEW)
#pragma unroll
      for (int i = 0; i < HALF; i++) threshold[i] = i + 1 < HALF ? s.thresholds[i] : 0, size[i] = s.centroids[HALF + i];
  }
  // The code of z, and its entry.
  INLINE int operator()(float z, float& entry) const {
    const float x = fabsf(z);
    int level = 0;
    if constexpr (FEW) {
      entry = size[0];
#pragma unroll
      for (int i = 0; i < HALF - 1; i++) {
        const bool above = x > threshold[i];
        level += above, entry = above ? size[i + 1] : entry;
      }
    } else {
#pragma unroll
      for (int step = HALF / 2; step; step /= 2)
        if (s.thresholds[level + step - 1] < x) level += step;
      entry = s.centroids[HALF + level];
    }
    entry = z < 0 ? -entry : entry;
    return z < 0 ? HALF - 1 - level : HALF + level;
  }
};

// A thread brings 16 neighbours, and does the first four strides of the rotation on them.
INLINE void load(const Arguments& a, Shared& s) {
  constexpr int SIZE = INPUT == FP32 ? 4 : 2, TOKENS = THREADS / PARTS;  // at a time
  const int group = threadIdx.x % PARTS;
  float signs[LANES];
  if constexpr (ROTATED) load_row<FP32>(reinterpret_cast<const u8*>(a.tables), LANES * group, signs);
#pragma unroll
  for (int t = threadIdx.x / PARTS; t < BLOCK; t += TOKENS) {
    float x[LANES];
    load_row<INPUT>(a.x + (i64(blockIdx.x) * BLOCK + t) * D * SIZE, LANES * group, x);
    if constexpr (ROTATED) {
#pragma unroll
      for (int i = 0; i < LANES; i++) x[i] *= signs[i];
      butterflies(x);
    }
#pragma unroll
    for (int i = 0; i < LANES; i += 4)
      *reinterpret_cast<float4*>(&s.y[t][GROUP * group + i]) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
  }
}

// A token's channels lane, lane + 16, ...; the other strides of the rotation are theirs.
INLINE void read_token(const Shared& s, int t, float (&y)[PARTS]) {
  const int lane = threadIdx.x % LANES;
#pragma unroll
  for (int k = 0; k < PARTS; k++) y[k] = s.y[t][lane + GROUP * k];
}
INLINE void rotate_rest(float (&y)[PARTS]) {
  butterflies(y);
#pragma unroll
  for (int k = 0; k < PARTS; k++) y[k] *= SIZE_ROOT;
}

// The mean of each channel as it is stored: 8 bits with one step.
INLINE void take_mean(Shared& s, u8* out) {
  float mean = 0;
  const int c = threadIdx.x;
  if (c < D) mean = token_sum(&s.y[0][at(c)]) * (1.f / BLOCK);
  float top = fabsf(mean);
#pragma unroll
  for (int i = 1; i < 32; i *= 2) top = fmaxf(top, across(top, i));
  if (c % 32 == 0) s.largest[c / 32] = top;
  __syncthreads();
  top = 0;
  for (int i = 0; i < WARPS; i++) top = fmaxf(top, s.largest[i]);
  const u16 half = to_half(top * float(1.0 / 127));
  const float step = half_to_float(half), inverse = step > 0 ? 1.f / step : 0.f;
  if (c == 0) *reinterpret_cast<uint4*>(out + S::CHANNEL_ZERO.step) = make_uint4(half, 0, 0, 0);
  if (c >= D) return;
  const float steps = fminf(fmaxf(rintf(mean * inverse), -127.f), 127.f);
  reinterpret_cast<signed char*>(out + S::CHANNEL_ZERO.offset)[c] = (signed char)steps;
  s.zero[c] = steps * step;
}

// Scale and zero of equal steps, as they are stored, from a range.
struct Range {
  u16 scale, zero;
  float low, inverse;
  INLINE Range(float smallest, float largest) {
    scale = to_half((SYMMETRIC ? fmaxf(-smallest, largest) : largest - smallest) * INVERSE_TOP + 0.f);
    zero = to_half(smallest + 0.f);
    low = SYMMETRIC ? 0.f : half_to_float(zero);
    const float step = half_to_float(scale);
    inverse = step > 0 ? 1.f / step : 0.f;
  }
};

INLINE int steps(float y, float zero, float inverse) {
  return int(fminf(fmaxf(rintf((y - zero) * inverse), float(LOW)), float(HIGH))) - LOW;
}

INLINE void channel_ranges(Shared& s, u8* out) {
  for (int c = threadIdx.x; c < D; c += THREADS) {
    float smallest = s.y[0][at(c)], largest = smallest;
    for (int t = 1; t < BLOCK; t++) smallest = fminf(smallest, s.y[t][at(c)]), largest = fmaxf(largest, s.y[t][at(c)]);
    const Range range(smallest, largest);
    reinterpret_cast<u16*>(out + S::CHANNEL_SCALE.offset)[c] = range.scale;
    if (!SYMMETRIC) reinterpret_cast<u16*>(out + S::CHANNEL_ZERO.offset)[c] = range.zero;
    s.zero[c] = range.low, s.inverse[c] = range.inverse;
  }
}

INLINE void put_code(Shared& s, int t, int c, int code) {
  if constexpr (KEYS) s.codes[t][c] = u8(code);
  else s.codes[c][t / 4 % 2 * 32 + t / 2 % 2 * 16 + t / 16 * 4 + t / 8 % 2 * 2 + t % 2] = u8(code);
}

// Tokens of a thread, with 15 others: they hold the values while one thread a token takes root and quotient.
constexpr int MINE = BLOCK * LANES / THREADS;
INLINE int token(int i) { return threadIdx.x / LANES + i * (THREADS / LANES); }

INLINE void table_codes(Shared& s, const float* edges, u8* out) {
  const int lane = threadIdx.x % LANES;
  float y[MINE][PARTS];
#pragma unroll
  for (int i = 0; i < MINE; i++) {
    read_token(s, token(i), y[i]);
    if constexpr (ROTATED && !MEAN) rotate_rest(y[i]);
    if constexpr (MEAN)
#pragma unroll
      for (int k = 0; k < PARTS; k++) y[i][k] -= s.zero[lane + LANES * k];
    float energy = y[i][0] * y[i][0];
#pragma unroll
    for (int k = 1; k < PARTS; k++) energy += y[i][k] * y[i][k];
    energy = halved(energy);
    if (lane == 0) s.energy[token(i)] = energy;
  }
  __syncthreads();
  float norm = 0;
  if (threadIdx.x < BLOCK) {
    norm = sqrtf(s.energy[threadIdx.x]);
    s.unit[threadIdx.x] = norm > 0 ? ROOT_D / norm : 0.f;
  }
  __syncthreads();
  const Nearest nearest(s);
#pragma unroll
  for (int i = 0; i < MINE; i++) {
    const float unit = s.unit[token(i)];
    float along = 0;
#pragma unroll
    for (int k = 0; k < PARTS; k++) {
      float entry;
      put_code(s, token(i), lane + LANES * k, nearest(y[i][k] * unit, entry));
      const float term = y[i][k] * entry;
      along = k ? along + term : term;
    }
    if constexpr (UNBIASED) along = halved(along);
    if (UNBIASED && lane == 0) s.along[token(i)] = along;
  }
  __syncthreads();
  if (threadIdx.x >= BLOCK) return;
  const float along = UNBIASED ? s.along[threadIdx.x] : 0;
  const float scale = !UNBIASED ? norm * FACTOR : along > 0 ? s.energy[threadIdx.x] / along : 0.f;
  store<S::SCALE.kind>(out + S::SCALE.offset, threadIdx.x, scale, edges);
}

INLINE void uniform_codes(Shared& s, u8* out) {
  const int lane = threadIdx.x % LANES;
#pragma unroll
  for (int i = 0; i < MINE; i++) {
    const int t = token(i);
    float y[PARTS];
    read_token(s, t, y);
    float zero = 0, inverse = 0;
    if constexpr (METHOD == BY_TOKEN) {
      float smallest = y[0], largest = y[0];
#pragma unroll
      for (int k = 1; k < PARTS; k++) smallest = fminf(smallest, y[k]), largest = fmaxf(largest, y[k]);
#pragma unroll
      for (int j = 1; j < LANES; j *= 2)
        smallest = fminf(smallest, across(smallest, j)), largest = fmaxf(largest, across(largest, j));
      const Range range(smallest, largest);
      if (lane == 0) reinterpret_cast<u16*>(out + S::SCALE.offset)[t] = range.scale;
      if (lane == 0 && !SYMMETRIC) reinterpret_cast<u16*>(out + S::ZERO.offset)[t] = range.zero;
      zero = range.low, inverse = range.inverse;
    }
#pragma unroll
    for (int k = 0; k < PARTS; k++) {
      const int c = lane + LANES * k;
      const bool by_channel = METHOD == BY_CHANNEL;
      put_code(s, t, c, steps(y[k], by_channel ? s.zero[c] : zero, by_channel ? s.inverse[c] : inverse));
    }
  }
}

// Register (y, r) of lane (g, p) of a unit: four codes that are neighbours in shared memory.
INLINE u32 gather(const Shared& s, int u, int g, int p, int x, int y, int r) {
  const int row = 2 * x + r % 2, half = r / 2;
  const u8* at = KEYS ? &s.codes[8 * g + row][D / 4 * p + 16 * u + 8 * y + 4 * half]
                      : &s.codes[D / 8 * g + 8 * u + row][32 * y + 16 * half + 4 * p];
  return *reinterpret_cast<const u32*>(at);
}

INLINE void pack_block(const Shared& s, u8* out) {
  for (int i = threadIdx.x; i < D / 64 * 32 * (S::BITS == 1 ? 1 : 4); i += THREADS) {
    const int x = S::BITS == 1 ? 0 : i % 4, lane = (S::BITS == 1 ? i : i / 4) % 32, u = i / (S::BITS == 1 ? 32 : 128);
    u8* to = out + S::CODES + 512 * S::BITS * u + 16 * lane;
    if constexpr (S::BITS == 1) {
      u32 word[4] = {};
      for (int j = 0; j < 32; j++)
        word[j / 2 % 4] |= (gather(s, u, lane / 4, lane % 4, j / 8, j / 4 % 2, j / 2 % 2 * 2 + j % 2) & 0x01010101u)
                           << (2 * (j / 8) + j % 2);
      *reinterpret_cast<uint4*>(to) = make_uint4(word[0], word[1], word[2], word[3]);
    } else {
      u32 codes[2][4];
#pragma unroll
      for (int j = 0; j < 8; j++) codes[j / 4][j % 4] = gather(s, u, lane / 4, lane % 4, x, j / 4, j % 4);
      pack<S::BITS>(codes, x, to);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) encode(const Arguments a) {
  extern __shared__ __align__(16) u8 memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  u8* out = a.out + i64(blockIdx.x) * a.stride;
  const float* edges = a.tables + D + HALF - 1 + LEVELS;
  if constexpr (METHOD == TABLE) {
    for (int i = threadIdx.x; i < HALF - 1; i += THREADS) s.thresholds[i] = a.tables[D + i];
    for (int i = threadIdx.x; i < LEVELS; i += THREADS) s.centroids[i] = a.tables[D + HALF - 1 + i];
  }
  load(a, s);
  __syncthreads();
  if constexpr (MEAN && ROTATED) {  // the mean is that of rotated values
    for (int t = threadIdx.x / LANES; t < BLOCK; t += THREADS / LANES) {
      float y[PARTS];
      read_token(s, t, y);
      rotate_rest(y);
#pragma unroll
      for (int k = 0; k < PARTS; k++) s.y[t][threadIdx.x % LANES + GROUP * k] = y[k];
    }
    __syncthreads();
  }
  if constexpr (MEAN) take_mean(s, out);
  if constexpr (METHOD == BY_CHANNEL) channel_ranges(s, out);
  if constexpr (MEAN || METHOD == BY_CHANNEL) __syncthreads();
  if constexpr (METHOD == TABLE) table_codes(s, edges, out);
  else uniform_codes(s, out);
  __syncthreads();
  pack_block(s, out);
}
