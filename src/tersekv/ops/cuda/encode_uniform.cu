// Encoders with equal steps over the range of a token or of a channel: see `UniformEncoder`. A block of threads for each block of
// tokens, 16 lanes for each token.
#include "blocks.cuh"
#include "pack.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int GROUP = LANES + 4;       // floats of 16 channels in shared memory: rows of them are in different banks,
constexpr int WIDTH = PARTS * GROUP + LANES;  // and so are the rows of two tokens
constexpr int CODE_WIDTH = KEYS ? D + 4 : BLOCK + 4;  // rows of codes: tokens of keys, channels of values
constexpr int CODE_ROWS = KEYS ? BLOCK : D;

struct Shared {
  float y[BLOCK][WIDTH];
  float zero[D], inverse[D];
  u8 codes[CODE_ROWS][CODE_WIDTH];
};

INLINE int at(int channel) { return channel + channel / LANES * (GROUP - LANES); }

// A thread brings 16 neighbours.
INLINE void load(const Arguments& a, Shared& s) {
  constexpr int SIZE = INPUT == FP32 ? 4 : 2, TOKENS = THREADS / PARTS;  // at a time
  const int group = threadIdx.x % PARTS;
#pragma unroll
  for (int t = threadIdx.x / PARTS; t < BLOCK; t += TOKENS) {
    float x[LANES];
    load_row<INPUT>(a.x + (i64(blockIdx.x) * BLOCK + t) * D * SIZE, LANES * group, x);
#pragma unroll
    for (int i = 0; i < LANES; i += 4)
      *reinterpret_cast<float4*>(&s.y[t][GROUP * group + i]) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
  }
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

INLINE void uniform_codes(Shared& s, u8* out) {
  const int lane = threadIdx.x % LANES;
#pragma unroll
  for (int t = threadIdx.x / LANES; t < BLOCK; t += THREADS / LANES) {
    float y[PARTS];
#pragma unroll
    for (int k = 0; k < PARTS; k++) y[k] = s.y[t][lane + GROUP * k];
    float zero = 0, inverse = 0;
    if constexpr (!BY_CHANNEL) {
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
      put_code(s, t, c, steps(y[k], BY_CHANNEL ? s.zero[c] : zero, BY_CHANNEL ? s.inverse[c] : inverse));
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
  load(a, s);
  pad(out);
  __syncthreads();
  if constexpr (BY_CHANNEL) {
    channel_ranges(s, out);
    __syncthreads();
  }
  uniform_codes(s, out);
  __syncthreads();
  pack_block(s, out);
}
