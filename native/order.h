// Codes as one byte each into the bits of a storage order, and back. See tersekv/orders.py for the orders.
//
// The simd orders are packed from units of 512 bytes, eight fields of 64: for keys, byte p of field f is the code of
// token 16 (f % 4) + p / 4 and channel 4 (f / 4) + p % 4; for values, of token 4 f + p % 4 and channel p / 4.
#pragma once
#include "encode.h"
#include "vector.h"

namespace tersekv::TERSEKV_ISA {
namespace {

using Ints = Isa::Ints;
using Floats = Isa::Floats;
using Quad = Isa::Quad;
using QuadInts = Isa::QuadInts;

template <int BITS>
INLINE void pack_unit(const uint8_t* fields, uint8_t* unit) {
  using Pairs = Isa::Pairs;
  for (int part = 0; part < 64; part += Isa::WIDTH) {
    Pairs field[8], word[BITS];
    for (int f = 0; f < 8; f++) field[f] = Isa::load<Pairs>(fields + 64 * f + part);
    if constexpr (BITS == 3) {
      for (int i = 0; i < 3; i++) word[i] = field[i] | field[i + 3] << 3;
      const Pairs low = (Pairs)Isa::all_bytes(3), top = (Pairs)Isa::all_bytes(4);
      word[0] |= (field[6] & low) << 6;
      word[1] |= (field[7] & low) << 6;
      word[2] |= (field[6] & top) << 4 | (field[7] & top) << 5;
    } else {
      constexpr int EACH = 8 / BITS;
      for (int i = 0; i < BITS; i++) {
        word[i] = field[EACH * i];
        for (int k = 1; k < EACH; k++) word[i] |= field[EACH * i + k] << BITS * k;
      }
    }
    for (int i = 0; i < BITS; i++) Isa::store(unit + 64 * i + part, word[i]);
  }
}

template <int BITS>
INLINE void unpack_unit(const uint8_t* unit, uint8_t* fields) {
  using Pairs = Isa::Pairs;
  const Pairs mask = (Pairs)Isa::all_bytes((1 << BITS) - 1), low = (Pairs)Isa::all_bytes(3);
  for (int part = 0; part < 64; part += Isa::WIDTH) {
    Pairs field[8], word[BITS];
    for (int i = 0; i < BITS; i++) word[i] = Isa::load<Pairs>(unit + 64 * i + part);
    if constexpr (BITS == 3) {
      for (int f = 0; f < 6; f++) field[f] = word[f % 3] >> 3 * (f / 3);
      field[6] = (word[0] >> 6 & low) | (word[2] >> 4 & ~low);
      field[7] = (word[1] >> 6 & low) | (word[2] >> 5 & ~low);
    } else {
      for (int f = 0; f < 8; f++) field[f] = word[f * BITS / 8] >> f * BITS % 8;
    }
    for (int f = 0; f < 8; f++) Isa::store(fields + 64 * f + part, field[f] & mask);
  }
}

// Eight codes between eight bytes and the low bits of a word: neighbours close up to 2, 4 and 8 codes.
template <int BITS>
INLINE uint64_t closed_up(uint64_t x) {
  x = (x | x >> (8 - BITS)) & 0x0001000100010001u * ((1u << 2 * BITS) - 1);
  x = (x | x >> (16 - 2 * BITS)) & 0x0000000100000001u * ((uint64_t(1) << 4 * BITS) - 1);
  return x | x >> (32 - 4 * BITS);
}

template <int BITS>
INLINE uint64_t spread(uint64_t x) {
  x = (x | x << (32 - 4 * BITS)) & 0x0000000100000001u * ((uint64_t(1) << 4 * BITS) - 1);
  x = (x | x << (16 - 2 * BITS)) & 0x0001000100010001u * ((1u << 2 * BITS) - 1);
  return (x | x << (8 - BITS)) & 0x0101010101010101u * ((1u << BITS) - 1);
}

// The words of the trellis orders: 32 bits of a token's codes, the first one highest.
INLINE int word_at(Order order, int words, int t, int k) {
  return order == Order::trellis_k ? 4 * (BLOCK * k + t) : 16 * (t / 4 * words + k) + 4 * (t % 4);
}

template <int BITS>
void pack_words(Order order, int d, const uint8_t* rows, uint8_t* out) {
  for (int t = 0; t < BLOCK; t++) {
    uint64_t bits = 0;
    for (int c = 0, held = 0, k = 0; c < d; c += 8) {
      uint64_t eight;
      std::memcpy(&eight, rows + t * d + c, 8);
      const uint64_t closed = closed_up<BITS>(__builtin_bswap64(eight)) & ((uint64_t(1) << 8 * BITS) - 1);
      bits = bits << 8 * BITS | closed, held += 8 * BITS;
      for (; held >= 32; held -= 32, k++) {
        const uint32_t word = uint32_t(bits >> (held - 32));
        std::memcpy(out + word_at(order, d * BITS / 32, t, k), &word, 4);
      }
    }
  }
}

template <int BITS>
void unpack_words(Order order, int d, const uint8_t* codes, uint8_t* rows) {
  for (int t = 0; t < BLOCK; t++) {
    uint64_t bits = 0;
    for (int c = 0, held = 0, k = 0; c < d; c++) {
      if (held < BITS) {
        uint32_t word;
        std::memcpy(&word, codes + word_at(order, d * BITS / 32, t, k++), 4);
        bits = bits << 32 | word, held += 32;
      }
      held -= BITS;
      rows[t * d + c] = uint8_t(bits >> held & ((1 << BITS) - 1));
    }
  }
}

template <int BITS>
void pack_codes(Order order, int d, const uint8_t* bytes, uint8_t* out) {
  const int units = BLOCK * d / 512;
  if constexpr (BITS < 8)
    if (in_words(order)) return pack_words<BITS>(order, d, bytes, out);
  if (order != Order::linear) {
    for (int u = 0; u < units; u++) pack_unit<BITS>(bytes + 512 * u, out + 64 * BITS * u);
  } else if constexpr (BITS == 8) {
    std::memcpy(out, bytes, size_t(BLOCK) * d);
  } else {
    for (int i = 0; i < BLOCK * d / 8; i++) {
      uint64_t x;
      std::memcpy(&x, bytes + 8 * i, 8);
      x = closed_up<BITS>(x);
      for (int k = 0; k < BITS; k++) out[BITS * i + k] = uint8_t(x >> 8 * k);
    }
  }
}

template <int BITS>
void unpack_codes(Order order, int d, const uint8_t* codes, uint8_t* bytes) {
  const int units = BLOCK * d / 512;
  if constexpr (BITS < 8)
    if (in_words(order)) return unpack_words<BITS>(order, d, codes, bytes);
  if (order != Order::linear) {
    for (int u = 0; u < units; u++) unpack_unit<BITS>(codes + 64 * BITS * u, bytes + 512 * u);
  } else if constexpr (BITS == 8) {
    std::memcpy(bytes, codes, size_t(BLOCK) * d);
  } else {
    for (int i = 0; i < BLOCK * d / 8; i++) {
      uint64_t x = 0;
      for (int k = 0; k < BITS; k++) x |= uint64_t(codes[BITS * i + k]) << 8 * k;
      x = spread<BITS>(x);
      std::memcpy(bytes + 8 * i, &x, 8);
    }
  }
}

// Calls move(byte in the order's units, byte in the rows, how many) for all codes of a block.
template <class Move>
INLINE void each_run(Order order, int d, Move move) {
  if (order == Order::linear || in_words(order)) return move(0, 0, BLOCK * d);
  if (order == Order::simd_k) {
    for (int t = 0; t < BLOCK; t++)
      for (int c = 0; c < d; c += 4) move(64 * c + 4 * t, t * d + c, 4);
  } else {
    for (int t = 0; t < BLOCK; t++)
      for (int c = 0; c < d; c++)
        move(512 * (2 * (c / 16) + t / 32) + 64 * (t % 32 / 4) + 4 * (c % 16) + t % 4, t * d + c, 1);
  }
}

template <int BITS>
void repack_block(int d, Order from, Order to, const uint8_t* codes, EncodeScratch& s, uint8_t* out) {
  unpack_codes<BITS>(from, d, codes, s.codes);
  each_run(from, d, [&](int at, int row, int n) { std::memcpy(s.rows + row, s.codes + at, n); });
  each_run(to, d, [&](int at, int row, int n) { std::memcpy(s.codes + at, s.rows + row, n); });
  pack_codes<BITS>(to, d, s.codes, out);
}

}  // namespace
}  // namespace tersekv::TERSEKV_ISA
