// From stored codes to operands of matrix instructions. The order of the bits is `mma_k` and `mma_v` of orders.py.
#pragma once
#include "ptx.cuh"

// Four bytes from an 8-entry table by the low four nibbles of `index`, whose highest bits must be 0.
INLINE u32 look_up(u32 low, u32 high, u32 index) { return prmt(low, high, index); }

INLINE uint4 vector(const u8* codes, int v) { return *reinterpret_cast<const uint4*>(codes + 512 * v); }

template <int BITS>
struct Unit;  // `codes`: a lane's first vector of the unit. get(x, a): operands A of rows 16x.., columns 0.. and 32.., which
              // are to be multiplied one PART after the other

template <>
struct Unit<1> {  // a field stays where it lies in its byte: field 2x + r counts 2^(2x + r) times
  static constexpr bool SIGNED = false;
  static constexpr int PARTS = 1;
  u32 word[4];
  INLINE Unit(const u8* codes, const u32 (&)[4]) {
    const uint4 v = vector(codes, 0);
    word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
  }
  INLINE void get(int x, u32 (&a)[PARTS][2][4]) const {
#pragma unroll
    for (int i = 0; i < 8; i++) a[0][i / 4][i % 4] = word[i / 2] & (0x01010101u << (2 * x + i % 2));
  }
};

template <>
struct Unit<2> {
  static constexpr bool SIGNED = true;
  static constexpr int PARTS = 1;
  u32 word[8], entries;
  INLINE Unit(const u8* codes, const u32 (&table)[4]) : entries(table[0]) {
    const uint4 v = vector(codes, 0), w = vector(codes, 1);
    word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
    word[4] = w.x, word[5] = w.y, word[6] = w.z, word[7] = w.w;
  }
  INLINE void get(int x, u32 (&a)[PARTS][2][4]) const {
#pragma unroll
    for (int y = 0; y < 2; y++)
#pragma unroll
      for (int field = 0; field < 2; field++) {
        const u32 index = (word[2 * x + y] >> (2 * field)) & 0x33333333u;
        a[0][y][2 * field] = look_up(entries, entries, index);
        a[0][y][2 * field + 1] = look_up(entries, entries, index >> 16);
      }
  }
};

template <>
struct Unit<3> {
  static constexpr bool SIGNED = true;
  static constexpr int PARTS = 1;
  uint4 v[3];
  u32 low, high;
  INLINE Unit(const u8* codes, const u32 (&table)[4]) : low(table[0]), high(table[1]) {
#pragma unroll
    for (int i = 0; i < 3; i++) v[i] = vector(codes, i);
  }
  static INLINE u32 part(const uint4& v, int x) { return x == 0 ? v.x : x == 1 ? v.y : x == 2 ? v.z : v.w; }
  INLINE void get(int x, u32 (&a)[PARTS][2][4]) const {
    const u32 w[3] = {part(v[0], x), part(v[1], x), part(v[2], x)};
    const u32 last = (w[0] >> 3 & 0x11111111u) | (w[1] >> 2 & 0x22222222u) | (w[2] >> 1 & 0x44444444u);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 index = i < 3 ? w[i] & 0x77777777u : last;
      a[0][i / 2][2 * (i % 2)] = look_up(low, high, index);
      a[0][i / 2][2 * (i % 2) + 1] = look_up(low, high, index >> 16);
    }
  }
};

// 16 entries are two tables of eight. A look-up whose nibble has its highest bit set gives an entry's sign instead: -1 from the
// entries below 0 (part 0), and 0 from the others (part 1), which are stored one larger. So the parts add up to the entry,
// and the matrix instruction adds: there is no mask, and nothing to choose.
template <>
struct Unit<4> {
  static constexpr bool SIGNED = true;
  static constexpr int PARTS = 2;
  const u8* codes;
  const u32 (&table)[4];
  INLINE Unit(const u8* codes, const u32 (&table)[4]) : codes(codes), table(table) {}
  INLINE void get(int x, u32 (&a)[PARTS][2][4]) const {
    const uint4 v = vector(codes, x);
    const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int part = 0; part < 2; part++) {
        const u32 index = part ? w[i] ^ 0x88888888u : w[i];
        a[part][i / 2][2 * (i % 2)] = prmt(table[2 * part], table[2 * part + 1], index);
        a[part][i / 2][2 * (i % 2) + 1] = prmt(table[2 * part], table[2 * part + 1], index >> 16);
      }
  }
};

template <>
struct Unit<8> {  // equal steps only: code - 128
  static constexpr bool SIGNED = true;
  static constexpr int PARTS = 1;
  const u8* codes;
  INLINE Unit(const u8* codes, const u32 (&)[4]) : codes(codes) {}
  INLINE void get(int x, u32 (&a)[PARTS][2][4]) const {
#pragma unroll
    for (int y = 0; y < 2; y++) {
      const uint4 v = vector(codes, 2 * x + y);
      a[0][y][0] = v.x ^ 0x80808080u, a[0][y][1] = v.y ^ 0x80808080u;
      a[0][y][2] = v.z ^ 0x80808080u, a[0][y][3] = v.w ^ 0x80808080u;
    }
  }
};
