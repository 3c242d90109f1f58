// The inverse of `unpack.cuh`, for codes that lie token by token: rows of words, in them 4 bits a code, or 8 where a code has 8.
#pragma once
#include "ptx.cuh"

INLINE u32 mixed(u32 mask, u32 a, u32 b) { return (a & mask) | (b & ~mask); }

// Word i of row `token`.
struct CodeRows {
  const u32* words;
  int stride;  // of rows, in words
  INLINE u32 operator()(int token, int i) const { return words[token * stride + i]; }
};

// Codes of a lane's unit: [x][y][half], four neighbours of row 2x in the lower half of a word and of row 2x + 1 in the upper.
INLINE void gather_keys(const CodeRows& rows, int u, int g, int p, u32 (&n)[4][2][2]) {
#pragma unroll
  for (int x = 0; x < 4; x++)
#pragma unroll
    for (int y = 0; y < 2; y++) {
      const int word = D / 32 * p + 2 * u + y;
      const u32 first = rows(8 * g + 2 * x, word), second = rows(8 * g + 2 * x + 1, word);
      n[x][y][0] = prmt(first, second, 0x5410), n[x][y][1] = prmt(first, second, 0x7632);
    }
}
INLINE void gather_values(const CodeRows& rows, int u, int g, int p, u32 (&n)[4][2][2]) {
  constexpr u32 EVEN = 0x0F0F0F0Fu;
#pragma unroll
  for (int y = 0; y < 2; y++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 rows_of[2][2];  // two tokens; even and odd channels
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int token = 16 * p + 4 * y + 2 * half + 8 * i, word = D / 64 * g + u;
        const u32 first = rows(token, word), second = rows(token + 1, word);
        rows_of[0][i] = mixed(EVEN, first, second << 4), rows_of[1][i] = mixed(EVEN, first >> 4, second);
      }
#pragma unroll
      for (int x = 0; x < 4; x += 2) {
        const u32 even = prmt(rows_of[0][0], rows_of[0][1], x ? 0x7362 : 0x5140);
        const u32 odd = prmt(rows_of[1][0], rows_of[1][1], x ? 0x7362 : 0x5140);
        n[x][y][half] = prmt(even, odd, 0x5410), n[x + 1][y][half] = prmt(even, odd, 0x7632);
      }
    }
}

// A lane's words of a unit, [vector][word].
template <int BITS>
INLINE void from_nibbles(const u32 (&n)[4][2][2], u32 (&out)[BITS][4]) {
#pragma unroll
  for (int x = 0; x < 4; x++) {
    if constexpr (BITS == 4)
#pragma unroll
      for (int i = 0; i < 4; i++) out[x][i] = n[x][i / 2][i % 2];
    if constexpr (BITS == 3) {
      const u32 last = n[x][1][1];
      out[0][x] = n[x][0][0] | (last & 0x11111111u) << 3;
      out[1][x] = n[x][0][1] | (last & 0x22222222u) << 2;
      out[2][x] = n[x][1][0] | (last & 0x44444444u) << 1;
    }
    if constexpr (BITS == 2)
#pragma unroll
      for (int y = 0; y < 2; y++) out[x / 2][2 * (x % 2) + y] = n[x][y][0] | n[x][y][1] << 2;
    if constexpr (BITS == 1)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const u32 word = n[x][i / 2][i % 2];
        const u32 first = prmt(word, word >> 4, 0x5140) & 0x01010101u, second = prmt(word, word >> 4, 0x7362) & 0x01010101u;
        out[0][i] = (x ? out[0][i] : 0) | first << (2 * x) | second << (2 * x + 1);
      }
  }
}

// Codes of 8 bits are their own words.
INLINE void bytes_of_keys(const CodeRows& rows, int u, int g, int p, u32 (&out)[8][4]) {
#pragma unroll
  for (int i = 0; i < 32; i++) {
    const int x = i / 8, y = i / 4 % 2, r = i % 4;
    out[i / 4][r] = rows(8 * g + 2 * x + r % 2, D / 16 * p + 4 * u + 2 * y + r / 2);
  }
}
INLINE void bytes_of_values(const CodeRows& rows, int u, int g, int p, u32 (&out)[8][4]) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int y = i / 4, half = i / 2 % 2, word = D / 32 * g + 2 * u + i % 2, token = 16 * p + 4 * y + 2 * half;
    u32 pair[2][2];  // channels 0, 1 and 2, 3 of two tokens
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const u32 first = rows(token + 8 * j, word), second = rows(token + 8 * j + 1, word);
      pair[0][j] = prmt(first, second, 0x5140), pair[1][j] = prmt(first, second, 0x7362);
    }
#pragma unroll
    for (int row = 0; row < 4; row++) {  // of eight: 4 (i % 2) + row
      const int x = 2 * (i % 2) + row / 2, parity = row % 2;
      out[2 * x + y][parity + 2 * half] = prmt(pair[row / 2][0], pair[row / 2][1], parity ? 0x7632 : 0x5410);
    }
  }
}

template <int BITS>
INLINE void pack(const CodeRows& rows, int u, int g, int p, u32 (&out)[BITS][4]) {
  if constexpr (BITS == 8) {
    if constexpr (KEYS) bytes_of_keys(rows, u, g, p, out);
    else bytes_of_values(rows, u, g, p, out);
  } else {
    u32 n[4][2][2];
    if constexpr (KEYS) gather_keys(rows, u, g, p, n);
    else gather_values(rows, u, g, p, n);
    from_nibbles<BITS>(n, out);
  }
}
