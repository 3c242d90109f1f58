// The `grid` recipe on codes in the simd order: scores of keys, and sums of values, for R query rows at a time.
//
// Keys: a unit is 64 tokens x 8 channels, values: 16 channels x 32 tokens; either way 512 codes in BITS vectors of
// 64 bytes. Field f of a unit is one code in each byte. Keys: field f holds tokens 16 (f % 4).. and channels
// 4 (f / 4)..; values: tokens 4 f... Byte p belongs to lane p / 4 (a token of keys, a channel of values), and the four
// bytes of a lane are summed by one dot product, so neither side needs a horizontal sum.
#pragma once
#include "vector.h"

namespace tersekv::TERSEKV_ISA {

constexpr int VECTOR = 64;            // bytes; narrower registers take it in parts
constexpr int PARTS = VECTOR / Isa::WIDTH;
constexpr int LOOKED_UP = 8;          // as BITS of the int8 kernels: the bytes are levels already

using Bytes = Isa::Bytes;
using Ints = Isa::Ints;
using Floats = Isa::Floats;

// The codes of a unit, as far as one register reaches.
template <int BITS>
struct Unit {
  using Pairs = Isa::Pairs;
  static constexpr bool WIDE_3 = BITS == 3 && Isa::INDEX_BITS == 6;
  Pairs word[BITS];

  explicit INLINE Unit(const uint8_t* unit) {
    for (int i = 0; i < BITS; i++) word[i] = Isa::load<Pairs>(unit + VECTOR * i);
  }
  // The code lies in the low bits; higher bits of a byte hold other fields.
  INLINE Bytes field(int f) const {
    if constexpr (BITS == 3) {
      if (f < 6) return (Bytes)(word[f % 3] >> 3 * (f / 3));
      // The two top bits of three words make two more fields: two bits from one word, the third from the last.
      const Pairs low = (Pairs)Isa::all_bytes(3);
      return (Bytes)(((word[f - 6] >> 6) & low) | ((word[2] >> (f - 2)) & ~low));
    } else {
      constexpr int EACH = 8 / BITS;
      return (Bytes)(word[f / EACH] >> BITS * (f % EACH));
    }
  }
  // The code lies where table `table_of(f)` looks for it: most fields are indices as they are, and several share one.
  INLINE Bytes index(int f) const {
    if constexpr (WIDE_3) {
      if (f < 6) return (Bytes)word[f % 3];
      const Pairs first = (Pairs)Isa::all_bytes(0x03), second = (Pairs)Isa::all_bytes(0x0c);
      return (Bytes)(((word[0] >> 6) & first) | ((word[1] >> 4) & second) | ((word[2] >> 2) & ~(first | second)));
    } else if constexpr (BITS == 3) {
      return field(f);
    } else {
      constexpr int EACH = 8 / BITS;
      return (Bytes)(word[f / EACH] >> (f % EACH * BITS / 4 * 4));
    }
  }
  static constexpr int TABLES = WIDE_3 || BITS == 1 ? 4 : BITS == 2 ? 2 : 1;
  static constexpr int table_of(int f) {
    if (WIDE_3) return f < 6 ? f / 3 : f - 4;
    return BITS == 3 ? 0 : f % (8 / BITS) % TABLES;
  }
};

// Levels that codes stand for in the int8 kernels. See `Side::levels`.
template <int BITS>
struct Levels {
  static constexpr int TABLES = Unit<BITS>::TABLES;
  Bytes table[TABLES], mask = Isa::all_bytes((1 << Isa::INDEX_BITS) - 1);
  explicit INLINE Levels(const uint8_t* levels) {
    for (int i = 0; i < TABLES; i++) table[i] = Isa::load<Bytes>(levels + VECTOR * i);
  }
  INLINE Bytes operator()(const Unit<BITS>& unit, int f) const {
    if constexpr (BITS == LOOKED_UP) return unit.field(f);
    return Isa::look_up(table[unit.table_of(f)], unit.index(f), mask);
  }
};

INLINE int32_t four(const int8_t* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return x;
}

// Lines of a page that is read later, asked for a few at a time: memory has its own time to answer, and pages lie where
// the table says, which no hardware foresees.
struct Ahead {
  const uint8_t* at;
  int each;  // 256ths of a line, a step
  bool first_level;
  INLINE void operator()(int step) const {
    for (int i = step * each >> 8; i < (step + 1) * each >> 8; i++)
      if (first_level) __builtin_prefetch(at + VECTOR * i, 0, 3);
      else __builtin_prefetch(at + VECTOR * i, 0, 2);
  }
};

// TILES token tiles from `first` on, which share the loads of their queries. EACH: every tile has queries of its own, R
// rows after those of the tile before.
template <int BITS, int R, int TILES, bool EACH>
INLINE void score_tiles(const Levels<BITS>& look_up, const uint8_t* codes, int first, int part, Ahead ahead, int d,
                        const int8_t* q, float* dots) {
  Ints sum[TILES][R] = {};
  for (int u = 0; u < d / 8; u++) {
    if (part == 0 && first == 0) ahead(u);
    const Unit<BITS> unit(codes + u * VECTOR * BITS + part * Isa::WIDTH);
    for (int half = 0; half < 2; half++) {
      Bytes level[TILES];
      for (int t = 0; t < TILES; t++) level[t] = look_up(unit, 4 * half + first + t);
      for (int r = 0; r < R; r++) {
        const int8_t* row = q + r * d + 8 * u + 4 * half;
        const int32_t queries = four(row);
        for (int t = 0; t < TILES; t++)
          sum[t][r] = Isa::dot(sum[t][r], level[t], EACH ? four(row + (first + t) * R * d) : queries);
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int t = 0; t < TILES; t++)
      Isa::store(dots + BLOCK * r + 16 * (first + t) + Isa::LANES * part, Isa::to_floats(sum[t][r]));
}

// dots[r][j] = sum over channels of level[j][c] * q[r][c], exactly.
template <int BITS, int R, bool EACH = false>
void score_int8(const uint8_t* levels, const uint8_t* codes, Ahead ahead, int d, const int8_t* q, float* dots) {
  const Levels<BITS> look_up(levels);
  for (int part = 0; part < PARTS; part++) {
    if constexpr (4 * R + 8 <= Isa::REGISTERS) {  // eight for levels, queries and constants
      score_tiles<BITS, R, 4, EACH>(look_up, codes, 0, part, ahead, d, q, dots);
    } else {
      score_tiles<BITS, R, 2, EACH>(look_up, codes, 0, part, ahead, d, q, dots);
      score_tiles<BITS, R, 2, EACH>(look_up, codes, 2, part, ahead, d, q, dots);
    }
  }
}

// TILES channel tiles at once, which share the loads of their weights.
template <int BITS, int R, int TILES>
INLINE void mix_tiles(const Levels<BITS>& look_up, const uint8_t* codes, int tile, int part, Ahead ahead, int d,
                      const int8_t* w, const float* gain, float* out) {
  Ints sum[TILES][R] = {};
  for (int half = 0; half < 2; half++) {
    const uint8_t* at = codes + (2 * tile + half) * VECTOR * BITS + part * Isa::WIDTH;
    const Unit<BITS> one(at), other(at + 2 * (TILES - 1) * VECTOR * BITS);
    if (part == 0)
      for (int t = 0; t < TILES; t++) ahead(2 * (tile + t) + half);
    for (int f = 0; f < 8; f++) {
      const Bytes level[2] = {look_up(one, f), look_up(other, f)};
      for (int r = 0; r < R; r++) {
        const int32_t weights = four(w + BLOCK * r + 32 * half + 4 * f);
        for (int t = 0; t < TILES; t++) sum[t][r] = Isa::dot(sum[t][r], level[t], weights);
      }
    }
  }
  for (int t = 0; t < TILES; t++)
    for (int r = 0; r < R; r++)
      Isa::add_to(out + r * d + 16 * (tile + t) + Isa::LANES * part, gain[r], Isa::to_floats(sum[t][r]));
}

// out[r][c] += gain[r] * (sum over tokens of w[r][j] * level[j][c], exactly).
template <int BITS, int R>
void mix_int8(const uint8_t* levels, const uint8_t* codes, Ahead ahead, int d, const int8_t* w, const float* gain,
              float* out) {
  const Levels<BITS> look_up(levels);
  for (int part = 0; part < PARTS; part++) {
    int tile = 0;
    for (; tile + Isa::TILES <= d / 16; tile += Isa::TILES)
      mix_tiles<BITS, R, Isa::TILES>(look_up, codes, tile, part, ahead, d, w, gain, out);
    for (; tile < d / 16; tile++) mix_tiles<BITS, R, 1>(look_up, codes, tile, part, ahead, d, w, gain, out);
  }
}

// The same two in fp32: q and w are floats, and a code stands for its table entry.
template <int BITS, int R, bool EACH = false>
void score_exact(const float* entries, const uint8_t* codes, Ahead ahead, int d, const float* q, float* dots) {
  const Isa::Table<BITS> table(entries);
  for (int part = 0; part < PARTS; part++) {
    Floats sum[4][R] = {};
    for (int u = 0; u < d / 8; u++) {
      if (part == 0) ahead(u);
      const Unit<BITS> unit(codes + u * VECTOR * BITS + part * Isa::WIDTH);
      for (int i = 0; i < 8; i++)
        for (int tile = 0; tile < 4; tile++) {
          const Floats value = table((Ints)unit.field(4 * (i / 4) + tile) >> 8 * (i % 4));
          for (int r = 0; r < R; r++)
            sum[tile][r] += value * Isa::all(q[r * d + 8 * u + i + (EACH ? tile * R * d : 0)]);
        }
    }
    for (int r = 0; r < R; r++)
      for (int tile = 0; tile < 4; tile++)
        Isa::store(dots + BLOCK * r + 16 * tile + Isa::LANES * part, sum[tile][r]);
  }
}

template <int BITS, int R>
void mix_exact(const float* entries, const uint8_t* codes, Ahead ahead, int d, const float* w, const float* gain,
               float* out) {
  const Isa::Table<BITS> table(entries);
  for (int tile = 0; tile < d / 16; tile++)
    for (int part = 0; part < PARTS; part++) {
      Floats sum[R] = {};
      for (int half = 0; half < 2; half++) {
        if (part == 0) ahead(2 * tile + half);
        const Unit<BITS> unit(codes + (2 * tile + half) * VECTOR * BITS + part * Isa::WIDTH);
        for (int i = 0; i < 32; i++) {
          const Floats value = table((Ints)unit.field(i / 4) >> 8 * (i % 4));
          for (int r = 0; r < R; r++) sum[r] += value * Isa::all(w[BLOCK * r + 32 * half + i]);
        }
      }
      for (int r = 0; r < R; r++) Isa::add_to(out + r * d + 16 * tile + Isa::LANES * part, gain[r], sum[r]);
    }
}

// Levels of a whole block, in the order of its codes: worth it when many query rows share them.
template <int BITS>
void look_up_block(const uint8_t* levels, bool, const uint8_t* codes, Ahead ahead, int d, uint8_t* out) {
  const Levels<BITS> look_up(levels);
  for (int u = 0; u < d / 8; u++) {
    ahead(u);
    for (int part = 0; part < PARTS; part++) {
      const Unit<BITS> unit(codes + u * VECTOR * BITS + part * Isa::WIDTH);
      for (int f = 0; f < 8; f++) Isa::store(out + (8 * u + f) * VECTOR + part * Isa::WIDTH, look_up(unit, f));
    }
  }
}

}  // namespace tersekv::TERSEKV_ISA
