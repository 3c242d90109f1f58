// The inverse of `unpack.cuh`: registers of four codes each to the words of a lane.
#pragma once
#include "ptx.cuh"

// The low four bits of four bytes as four nibbles.
INLINE u32 nibbles(u32 codes) {
  const u32 x = codes & 0x0F0F0F0Fu, y = (x | x >> 4) & 0x00FF00FFu;
  return (y | y >> 8) & 0xFFFFu;
}
INLINE u32 nibbles(u32 first, u32 second) { return nibbles(first) | nibbles(second) << 16; }

// What `Unit<BITS>::get(x, ...)` reads. `out`: the lane's first vector of the unit.
template <int BITS>
INLINE void pack(const u32 (&codes)[2][4], int x, u8* out) {
  auto put = [&](int vector, int word, u32 bits) { *reinterpret_cast<u32*>(out + 512 * vector + 4 * word) = bits; };
#pragma unroll
  for (int y = 0; y < 2; y++) {
    const u32* r = codes[y];
    if constexpr (BITS == 8)
      for (int i = 0; i < 4; i++) put(2 * x + y, i, r[i]);
    if constexpr (BITS == 4)
      for (int i = 0; i < 2; i++) put(x, 2 * y + i, nibbles(r[2 * i], r[2 * i + 1]));
    if constexpr (BITS == 2) put(x / 2, 2 * (x % 2) + y, nibbles(r[0], r[1]) | nibbles(r[2], r[3]) << 2);
  }
  if constexpr (BITS == 3) {
    const u32 last = nibbles(codes[1][2], codes[1][3]);
    put(0, x, nibbles(codes[0][0], codes[0][1]) | (last & 0x11111111u) << 3);
    put(1, x, nibbles(codes[0][2], codes[0][3]) | (last & 0x22222222u) << 2);
    put(2, x, nibbles(codes[1][0], codes[1][1]) | (last & 0x44444444u) << 1);
  }
}
