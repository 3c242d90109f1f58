// From a page in shared memory to bf16 operands B of matrix products, by four warps. Tokens, and the channels of keys, lie in
// an order of their own (`token_of`, `key_channel`), in which every lane stores 16 bytes at once and eight lanes meet no bank twice.
#pragma once
#include "planes.cuh"
#include "tensor.cuh"

constexpr int UNITS = D / 64;

#include "trellis.cuh"

constexpr float BIAS = 32768.f;  // 0x47000000: the two bytes below its first are a number that is added

// The token at a row of the keys and a column of the values.
INLINE int token_of(int n) { return (n & 0x31) | (n & 8) >> 1 | (n & 4) >> 1 | (n & 2) << 2; }
INLINE int place_of(int token) { return (token & 0x31) | (token & 4) << 1 | (token & 2) << 1 | (token & 8) >> 2; }

// The channel at a column of the keys: its first of eight neighbours, columns 8 * `chunk`.. of 64-channel part `unit`.
INLINE int key_channel(int unit, int chunk) {
  return (chunk % 2 + chunk / 4 * 2) * (D / 4) + 16 * unit + 8 * (chunk / 2 % 2);
}

// 16 entries: two look-ups by the low three bits of nibbles, and `upper`, bytes of ones or zeros, says which.
INLINE u32 look_up16(const u32 (&table)[4], u32 index, u32 upper) {
  const u32 low = look_up(table[0], table[1], index), high = look_up(table[2], table[3], index);
  return (low & ~upper) | (high & upper);
}

// How codes of a side become numbers: entry() * gain + offset(gain).
template <class S>
struct Entries {
  static constexpr bool BIT = S::BITS == 1, LISTED = S::LISTED;
  u32 table[4];
  const float* list;
  INLINE Entries(const float* list)
      : table{S::T0 ^ 0x80808080u, S::T1 ^ 0x80808080u, S::T2 ^ 0x80808080u, S::T3 ^ 0x80808080u}, list(list) {}

  // Operands A of unit `codes`, rows 16 x..: a[y][2 * half + r].
  INLINE void bytes(const u8* codes, int x, u32 (&a)[2][4]) const {
    if constexpr (S::BITS == 2) {
      const uint2 both = *reinterpret_cast<const uint2*>(codes + 512 * (x / 2) + 8 * (x % 2));
      const u32 word[2] = {both.x, both.y};
#pragma unroll
      for (int y = 0; y < 2; y++)
#pragma unroll
        for (int field = 0; field < 2; field++) {
          const u32 index = (word[y] >> (2 * field)) & 0x33333333u;
          a[y][2 * field] = look_up(table[0], table[0], index);
          a[y][2 * field + 1] = look_up(table[0], table[0], index >> 16);
        }
    } else if constexpr (S::BITS == 4) {
      const uint4 v = vector(codes, x);
      const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const u32 index = w[i] & 0x77777777u, up = w[i] << 4;  // the highest bits of nibbles to those of bytes, in turn
        a[i / 2][2 * (i % 2)] = look_up16(table, index, prmt(w[i], up, 0x9D8C));
        a[i / 2][2 * (i % 2) + 1] = look_up16(table, index >> 16, prmt(w[i], up, 0xBFAE));
      }
    } else {
      u32 whole[1][2][4];
      Unit<S::BITS>(codes, table).get(x, whole);
#pragma unroll
      for (int i = 0; i < 8; i++) a[i / 4][i % 4] = whole[0][i / 4][i % 4] ^ (S::BITS == 8 ? 0x80808080u : 0u);
    }
  }
  // Of byte i of a word; `field`: the row of a bit, which counts 2^field times.
  INLINE float entry(u32 word, int i, int field) const {
    if constexpr (LISTED) return list[word >> 8 * i & 0xFF];
    const float x = __uint_as_float(prmt(word, 0x47u, 0x4505u | i << 4));
    if constexpr (BIT) {
      const float unit = __uint_as_float(u32(127 - field) << 23);
      return fmaf(x, unit, -BIAS * unit);
    }
    return x;
  }
  // Of 15 significant bits, so that 32,896 = 257 * 128 of them are exact: else every value would be off to the same side.
  static INLINE float gain(float scale) {
    return LISTED ? scale : __uint_as_float(__float_as_uint(S::STEP * scale) & 0xFFFFFE00u);
  }
  static INLINE float offset(float scale, float zero) {
    if constexpr (LISTED) return zero;
    return fmaf(BIT ? 0.f : -(BIAS + 128.f), gain(scale), fmaf(S::MID, scale, zero));
  }
  // What zeros of channels are multiplied by for a token of some gain.
  static INLINE float zeros(float gain) { return !S::CHANNELS_FIRST ? 1.f : LISTED ? gain : gain * (1.f / S::STEP); }
};

// States of a trellis of the lane's channels 8 u + 2 x + r, in bytes a[y][2 * half + r] of four tokens.
template <class S>
INLINE void states(const u8* codes, int u, int x, u32 (&a)[2][4]) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int end = (8 * u + 2 * x + r + 1) * S::BITS, at = (end - 1) / 8, shift = 8 * (at + 1) - end;
    const u32 mask = 0x01010101u * (0xFFu >> shift);
    const uint4 now = vector(codes, at), before = vector_before<S>(codes, at);
    const u32 low[4] = {now.x, now.y, now.z, now.w}, high[4] = {before.x, before.y, before.z, before.w};
    u32 word[4];
#pragma unroll
    for (int i = 0; i < 4; i++) word[i] = (low[i] >> shift & mask) | (high[i] << (8 - shift) & ~mask);
#pragma unroll
    for (int y = 0; y < 2; y++)
#pragma unroll
      for (int half = 0; half < 2; half++) a[y][2 * half + r] = prmt(word[y], word[2 + y], half ? 0x7632 : 0x5410);
  }
}

template <class S, int COUNT>
INLINE void token_numbers(const u8* side, int first, float (&gain)[COUNT], float (&offset)[COUNT]) {
  float scale[COUNT], zero[COUNT];
  numbers_of<S::SCALE.kind>(side, S::SCALE, first, 1, scale);
  numbers_of<S::ZERO.kind>(side, S::ZERO, first, 0, zero);
#pragma unroll
  for (int t = 0; t < COUNT; t++) gain[t] = Entries<S>::gain(scale[t]), offset[t] = Entries<S>::offset(scale[t], zero[t]);
}

INLINE void put(u8* to, const float (&x)[8]) {
  *reinterpret_cast<uint4*>(to) =
      make_uint4(bfloats(x[0], x[1]), bfloats(x[2], x[3]), bfloats(x[4], x[5]), bfloats(x[6], x[7]));
}

// Warp `w` of four writes tokens 8 g + 2 w and the next, for each g of 8.
template <class S>
INLINE void dequantise_keys(const u8* side, u8* slot, const Entries<S>& entries, int w) {
  const int lane = threadIdx.x % 32, g = lane / 4, p = lane % 4;
  float gain[2], offset[2];
  token_numbers<S>(side, 8 * g + 2 * w, gain, offset);
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    u32 a[2][4];
    entries.bytes(side + S::CODES + 512 * S::BITS * u + 16 * lane, w, a);
#pragma unroll
    for (int y = 0; y < 2; y++) {
      const int chunk = p % 2 + 2 * y + p / 2 * 4, c = key_channel(u, chunk);
      float stretch[8], shift[8];
      numbers_of<S::CHANNEL_SCALE.kind>(side, S::CHANNEL_SCALE, c, 1, stretch);
      numbers_of<S::CHANNEL_ZERO.kind>(side, S::CHANNEL_ZERO, c, 0, shift);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float x[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
          x[i] = fmaf(entries.entry(a[y][2 * (i / 4) + r], i % 4, 2 * w + r), gain[r], offset[r]);
          const float zero = shift[i] * Entries<S>::zeros(gain[r]);
          if constexpr (S::CHANNEL_SCALE.kind != NONE) x[i] = fmaf(x[i], stretch[i], zero);
          else if constexpr (S::CHANNEL_ZERO.kind != NONE) x[i] += zero;
        }
        put(slot + 8192 * u + swizzled(place_of(8 * g + 2 * w + r), chunk), x);
      }
    }
  }
}

struct Weights {  // of the tokens of a page, for one warp
  float gain[64], offset[64];
};

// Warp `w` of four writes channels D / 8 g + 8 u + 2 w and the next; tokens that do not count are 0, be their bytes NaN.
template <class S>
INLINE void dequantise_values(const u8* side, u8* slot, const Entries<S>& entries, int w, int left, Weights& weights) {
  const int lane = threadIdx.x % 32, g = lane / 4, p = lane % 4;
  {
    float gain[2], offset[2];
    token_numbers<S>(side, 2 * lane, gain, offset);
#pragma unroll
    for (int t = 0; t < 2; t++) {
      const int at = place_of(2 * lane + t);
      const bool counts = 2 * lane + t < left;
      weights.gain[at] = counts ? gain[t] : 0, weights.offset[at] = counts ? offset[t] : 0;
    }
  }
  __syncwarp();
  float gain[16], offset[16];
#pragma unroll
  for (int i = 0; i < 16; i++) gain[i] = weights.gain[16 * p + i], offset[i] = weights.offset[16 * p + i];
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    u32 a[2][4];
    if constexpr (S::TRELLIS) states<S>(side + S::CODES + 16 * lane, u, w, a);
    else entries.bytes(side + S::CODES + 512 * S::BITS * u + 16 * lane, w, a);
    float stretch[2], shift[2];
    const int row = 8 * u + 2 * w;
    numbers_of<S::CHANNEL_SCALE.kind>(side, S::CHANNEL_SCALE, D / 8 * g + row, 1, stretch);
    numbers_of<S::CHANNEL_ZERO.kind>(side, S::CHANNEL_ZERO, D / 8 * g + row, 0, shift);
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
      for (int y = 0; y < 2; y++) {
        float x[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
          x[i] = fmaf(entries.entry(a[y][2 * (i / 4) + r], i % 4, 2 * w + r), gain[8 * y + i], offset[8 * y + i]);
          if constexpr (S::CHANNEL_SCALE.kind != NONE || S::CHANNEL_ZERO.kind != NONE)
            x[i] = fmaf(x[i], stretch[r], shift[r] * Entries<S>::zeros(gain[8 * y + i]));
        }
        put(slot + swizzled(8 * (row + r) + g, 2 * p + y), x);
      }
  }
  __syncwarp();
}

// Bytes of bf16 that are there already, 16 at a time: a lane's eight channels of a token. What eight lanes read and write
// lies in different banks, as half of them are ahead by a unit.
template <class S>
INLINE void copy_keys(const u8* side, u8* slot, int w) {
  const int lane = threadIdx.x % 32, chunk = lane % 8;
#pragma unroll
  for (int i = 0; i < 4 * UNITS; i++) {
    const int token = 16 * w + 4 * (i / UNITS) + lane / 8, u = (i + chunk / 4) % UNITS;
    *reinterpret_cast<uint4*>(slot + 8192 * u + swizzled(place_of(token), chunk)) =
        *reinterpret_cast<const uint4*>(side + S::CODES + 2 * (token * D + key_channel(u, chunk)));
  }
}

// As `copy_keys`, turned: eight tokens of two channels a lane. What does not count is 0, be it NaN.
template <class S>
INLINE void copy_values(const u8* side, u8* slot, int w, int left) {
  const int lane = threadIdx.x % 32, g = lane % 8;
#pragma unroll
  for (int i = 0; i < 2 * UNITS; i++) {
    const int chunk = 2 * w + i / UNITS, row = 2 * (lane / 8 + 4 * ((i + g / 4) % UNITS));
    u32 x[8];
#pragma unroll
    for (int t = 0; t < 8; t++) {
      const int token = token_of(8 * chunk + t);
      const u32 both = *reinterpret_cast<const u32*>(side + S::CODES + 2 * (token * D + D / 8 * g + row));
      x[t] = token < left ? both : 0;
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const u32 half = r ? 0x7632 : 0x5410;
      *reinterpret_cast<uint4*>(slot + swizzled(8 * (row + r) + g, chunk)) = make_uint4(
          prmt(x[0], x[1], half), prmt(x[2], x[3], half), prmt(x[4], x[5], half), prmt(x[6], x[7], half));
    }
  }
}

INLINE void put_keys(const u8* side, u8* slot, const Entries<K>& entries, int w) {
  if constexpr (K::DENSE) copy_keys<K>(side, slot, w);
  else dequantise_keys(side, slot, entries, w);
}

// `weights`: of each warp, where values are packed.
INLINE void put_values(const u8* side, u8* slot, const Entries<V>& entries, int w, int left, Weights* weights) {
  if constexpr (V::DENSE) copy_values<V>(side, slot, w, left);
  else dequantise_values(side, slot, entries, w, left, weights[w]);
}

// Entries that are looked up, from where constants lie to shared memory.
#define COPY_LIST(SIDE, TO, THREADS) \
  if constexpr (SIDE::LISTED)        \
    for (int i = threadIdx.x; i < 256; i += THREADS) TO[i] = SIDE##_LIST[i];
