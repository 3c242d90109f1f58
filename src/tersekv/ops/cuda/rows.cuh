// Rows of values in any precision, and the signed Hadamard rotation: its order of additions is part of the format.
#pragma once
#include "planes.cuh"

// COUNT neighbours of a row as floats.
template <int KIND, int COUNT>
INLINE void load_row(const u8* row, int first, float (&x)[COUNT]) {
  constexpr int SIZE = KIND == FP32 ? 4 : 2;
  if constexpr (COUNT * SIZE % 16 == 0) {
#pragma unroll
    for (int i = 0; i < COUNT * SIZE / 16; i++) {
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(row + first * SIZE) + i);
      const u32 word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 16 / SIZE; j++) {
        const u32 bits = word[j * SIZE / 4] >> (8 * (j * SIZE % 4));
        x[i * (16 / SIZE) + j] = KIND == FP32   ? __uint_as_float(bits)
                                 : KIND == FP16 ? half_to_float(u16(bits))
                                                : bfloat_to_float(u16(bits));
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i++) x[i] = number<KIND>(row, first + i);
  }
}

// The butterflies of the strides within COUNT numbers: 1, 2, 4, ... times the distance of neighbours in the row.
template <int COUNT>
INLINE void butterflies(float (&x)[COUNT]) {
#pragma unroll
  for (int stride = 1; stride < COUNT; stride *= 2)
#pragma unroll
    for (int i = 0; i < COUNT; i++)
      if (!(i & stride)) {
        const float a = x[i], b = x[i + stride];
        x[i] = a + b, x[i + stride] = a - b;
      }
}

// Unnormalised, of a row of which each lane holds COUNT neighbours: strides 1, 2, 4, ... to the row's half.
template <int COUNT>
INLINE void hadamard(float (&x)[COUNT]) {
  butterflies(x);
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2)
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      const float other = across(x[i], lanes);
      x[i] = threadIdx.x & lanes ? other - x[i] : x[i] + other;
    }
}
