// From codes of a trellis to 8-bit levels: a window of a token's bits gives several successive channels at once. The order of
// the bytes is `mma_trellis_v` of orders.py: a lane's tokens are the bytes of its vectors.
#pragma once
#include "unpack.cuh"

template <int BITS>
struct Windows {
  static constexpr int EACH = BITS <= 2 ? 4 : 2;         // channels of a look-up: more would need too large a table
  static constexpr int WIDTH = 8 + (EACH - 1) * BITS;    // bits of a window
  static constexpr int BYTES = EACH << WIDTH;
};

// The vector before a lane's `at`-th: before its first, the last one of the lanes whose channels come before, or zeros.
template <class S>
INLINE uint4 vector_before(const u8* codes, int at) {
  const bool none = at == 0 && threadIdx.x % 32 < 4;
  const uint4 v = vector(at || none ? codes : codes - 64, at ? at - 1 : UNITS * S::BITS - 1);
  return none ? make_uint4(0, 0, 0, 0) : v;
}

// Eight channels of a lane's 16 tokens.
template <int BITS>
struct Walks {
  u32 bytes[BITS + 1][4];  // four tokens in a word; first the bytes before those of the eight channels

  INLINE void load(int i, const uint4& v) { bytes[i][0] = v.x, bytes[i][1] = v.y, bytes[i][2] = v.z, bytes[i][3] = v.w; }

  // Each of two tokens in half a word: byte `i` of the channels above the byte before it.
  INLINE u32 pair(int i, int tokens) const {
    return prmt(bytes[i + 1][tokens / 2], bytes[i][tokens / 2], tokens % 2 ? 0x7362 : 0x5140);
  }
  static INLINE u32 four(const u8* windows, u32 at) { return *reinterpret_cast<const u32*>(windows + at); }
  static INLINE u32 two(const u8* windows, u32 first, u32 second) {
    return prmt(*reinterpret_cast<const u16*>(windows + first), *reinterpret_cast<const u16*>(windows + second), 0x5410);
  }

  // Of tokens 2 * `tokens` and the next, operand A of two groups of four channels: a[2 * token + group].
  INLINE void get(int tokens, const u8* windows, u32 (&a)[4]) const {
    if constexpr (BITS == 1) {
      const u32 x = pair(0, tokens);
      a[0] = four(windows, x >> 2 & 0x1FFC), a[1] = four(windows, x << 2 & 0x1FFC);
      a[2] = four(windows, x >> 18 & 0x1FFC), a[3] = four(windows, x >> 14 & 0x1FFC);
    } else if constexpr (BITS == 3) {
      const u32 first = pair(0, tokens), last = pair(2, tokens);
#pragma unroll
      for (int t = 0; t < 2; t++) {
        const u32 x = prmt(last, first, t ? 0x7632 : 0x5410);
        a[2 * t] = two(windows, x >> 17 & 0xFFE, x >> 11 & 0xFFE);
        a[2 * t + 1] = two(windows, x >> 5 & 0xFFE, x << 1 & 0xFFE);
      }
    } else {
#pragma unroll
      for (int group = 0; group < 2; group++) {
        if constexpr (BITS == 2) {
          const u32 x = pair(group, tokens);
          a[group] = four(windows, x << 2 & 0xFFFC), a[2 + group] = four(windows, x >> 14 & 0xFFFC);
        } else {
          const u32 x = pair(2 * group, tokens), y = pair(2 * group + 1, tokens);
          a[group] = two(windows, x << 1 & 0x1FFE, y << 1 & 0x1FFE);
          a[2 + group] = two(windows, x >> 15 & 0x1FFE, y >> 15 & 0x1FFE);
        }
      }
    }
  }
};
