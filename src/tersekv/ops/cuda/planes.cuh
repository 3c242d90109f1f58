// The numbers of a page that are not codes: one for each token, or one for each channel.
#pragma once
#include "ptx.cuh"

enum Kind : int { NONE, FP32, FP16, BF16, LOG8, INT8 };

struct Plane {
  int kind, offset, step;  // bytes from the start of the side; `step` is the fp16 number that multiplies INT8
};

// 0 or 2^((code - 144) / 12), without a branch: the product with min(code, 1) makes code 0 a zero.
INLINE float log8_to_float(u32 code) {
  const float x = __uint_as_float(0x43000000u | code << 8) - 128.f;  // code / 256, exactly
  return exp2_fast(x * (256.f / 12) - 12.f) * __saturatef(x * 256.f);
}

// Byte i of a word, exactly: a conversion instruction would take eight times as long.
INLINE float signed_byte(u32 word, int i) {
  return __uint_as_float(prmt(word ^ 0x80808080u, 0x4Bu, 0x4550u | i)) - 8388736.f;  // 2^23 + 128
}

template <int KIND>
INLINE float number(const u8* plane, int i) {
  if constexpr (KIND == FP32) return reinterpret_cast<const float*>(plane)[i];
  else if constexpr (KIND == FP16) return half_to_float(reinterpret_cast<const u16*>(plane)[i]);
  else if constexpr (KIND == BF16) return bfloat_to_float(reinterpret_cast<const u16*>(plane)[i]);
  else if constexpr (KIND == LOG8) return log8_to_float(plane[i]);
  else return float(reinterpret_cast<const signed char*>(plane)[i]);
}

// COUNT neighbours from `first` on, a multiple of COUNT, by as few loads as there can be.
template <int KIND, int COUNT>
INLINE void numbers(const u8* plane, int first, float (&out)[COUNT]) {
  constexpr int SIZE = KIND == FP32 ? 4 : KIND == FP16 || KIND == BF16 ? 2 : 1, WORDS = COUNT * SIZE / 4;
  if constexpr (WORDS == 0) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) out[i] = number<KIND>(plane, first + i);
  } else {
    u32 word[WORDS];
    const u32* from = reinterpret_cast<const u32*>(plane + first * SIZE);
    if constexpr (WORDS % 4 == 0) {
#pragma unroll
      for (int i = 0; i < WORDS; i += 4) {
        const uint4 v = *reinterpret_cast<const uint4*>(from + i);
        word[i] = v.x, word[i + 1] = v.y, word[i + 2] = v.z, word[i + 3] = v.w;
      }
    } else if constexpr (WORDS % 2 == 0) {
#pragma unroll
      for (int i = 0; i < WORDS; i += 2) {
        const uint2 v = *reinterpret_cast<const uint2*>(from + i);
        word[i] = v.x, word[i + 1] = v.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < WORDS; i++) word[i] = from[i];
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      const u32 bits = word[i * SIZE / 4] >> (8 * (i * SIZE % 4));
      if constexpr (KIND == FP32) out[i] = __uint_as_float(bits);
      else if constexpr (KIND == FP16) out[i] = half_to_float(u16(bits));
      else if constexpr (KIND == BF16) out[i] = bfloat_to_float(u16(bits));
      else if constexpr (KIND == LOG8) out[i] = log8_to_float(bits & 0xFF);
      else out[i] = signed_byte(word[i / 4], i % 4);
    }
  }
}

// Numbers of a side's plane, as they are meant: `otherwise` where the layout has no such plane.
template <int KIND, int COUNT>
INLINE void numbers_of(const u8* side, Plane plane, int first, float otherwise, float (&out)[COUNT]) {
  if constexpr (KIND == NONE) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) out[i] = otherwise;
  } else {
    numbers<KIND>(side + plane.offset, first, out);
    if constexpr (KIND == INT8) {
      const float step = number<FP16>(side + plane.step, 0);
#pragma unroll
      for (int i = 0; i < COUNT; i++) out[i] *= step;
    }
  }
}

// As `numbers_of`, with LOG8's looked up in `sizes`, which holds all 256: an eighth of the instructions.
template <int KIND, int COUNT>
INLINE void token_scales(const u8* side, Plane plane, int first, const float* sizes, float (&out)[COUNT]) {
  if constexpr (KIND == LOG8 && COUNT % 4 == 0) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
      const u32 word = *reinterpret_cast<const u32*>(side + plane.offset + first + i);
#pragma unroll
      for (int j = 0; j < 4; j++) out[i + j] = sizes[word >> 8 * j & 0xFF];
    }
  } else if constexpr (KIND == LOG8) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) out[i] = sizes[side[plane.offset + first + i]];
  } else {
    numbers_of<KIND>(side, plane, first, 1, out);
  }
}
