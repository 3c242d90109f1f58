// Blocks as rows of floats: how they are loaded, summed in the order of the format, and turned into codes.
#pragma once
#include "hadamard.h"
#include "numbers.h"
#include "order.h"

namespace tersekv::TERSEKV_ISA {
namespace {

constexpr int LANES = Isa::LANES;
constexpr int REGISTERS = 16 / LANES;  // of the 16 lanes in which channels are summed
constexpr int GROUP = 4;               // tokens that are worked on together
constexpr int AHEAD = 16;              // tokens whose input is asked for while one is worked on
#define EACH_TIME __attribute__((always_inline))

template <Kind KIND>
INLINE void load_row(const uint8_t* row, int d, float* y) {
  for (int c = 0; c < d; c += LANES) Isa::store(y + c, load_floats<KIND>(row, c));
}

// Tokens t..t+3 as floats, rotated if the codec rotates.
inline void load_group(const Encoder& e, const Input& in, int t, float* y) {
  for (int j = 0; j < GROUP; j++) {
    const uint8_t* row = in.data + (t + j) * in.stride;
    float* to = y + j * e.d;
    if (in.kind == Kind::fp32) load_row<Kind::fp32>(row, e.d, to);
    else if (in.kind == Kind::fp16) load_row<Kind::fp16>(row, e.d, to);
    else load_row<Kind::bf16>(row, e.d, to);
    if (e.rotated) rotate_row(to, e.d, e.signs, nullptr, to);
  }
}

inline void load_block(const Encoder& e, const Input& in, float* y) {
  for (int t = 0; t < BLOCK; t += GROUP) load_group(e, in, t, y + t * e.d);
}

// Four channel sums, whose 16 lanes are held in registers: 16, 8, 4, 2, 1.
INLINE Quad summed(Floats x[GROUP][REGISTERS]) {
  Floats lanes[GROUP];
  for (int j = 0; j < GROUP; j++) {
    for (int half = REGISTERS / 2; half; half /= 2)
      for (int r = 0; r < half; r++) x[j][r] += x[j][r + half];
    lanes[j] = x[j][0];
  }
  return Isa::halved(lanes);
}

template <class Term>
INLINE Quad channel_sums(int d, Term term) {
  Floats sum[GROUP][REGISTERS] = {};
  for (int c = 0; c < d; c += 16)
    for (int j = 0; j < GROUP; j++)
      for (int r = 0; r < REGISTERS; r++) sum[j][r] += term(j, c + r * LANES);
  return summed(sum);
}

// Over the tokens of a block: first half plus second half, and again. In this order it needs seven registers.
template <int STEP = 1>
INLINE Floats token_sum(const float* column, int d, int first = 0) {
  if constexpr (STEP == BLOCK) return Isa::load<Floats>(column + first * d);
  else return token_sum<2 * STEP>(column, d, first) + token_sum<2 * STEP>(column, d, first + STEP);
}

// Where codes go while a block is worked on, one byte each. Each step asks for the part of the input that lies `ahead`
// tokens further, into the second-level cache: hardware does not do it in time, and bursts would hold up the loads.
struct Sink {
  uint8_t* bytes;
  int d;
  Order order;
  const uint8_t* later;
  int64_t stride;
  int width;
  Sink(const Encoder& e, const Input& in, uint8_t* codes, int ahead)
      : bytes(codes), d(e.d), order(e.order), later(in.data + ahead * in.stride), stride(in.stride),
        width(in.kind == Kind::fp32 ? 4 : 2) {}
  // Codes of channels c.. of tokens t..t+3.
  INLINE void put(int t, int c, const Ints code[GROUP]) const {
    for (int j = 0; j < GROUP; j++) __builtin_prefetch(later + (t + j) * stride + c * width, 0, 2);
    if (order == Order::simd_k) {
      Isa::store_words(bytes + 64 * c + 4 * t, code);
    } else if (order == Order::simd_v) {
      uint8_t* unit = bytes + 512 * (2 * (c / 16) + t / 32);
      Isa::store(unit + 64 * (t % 32 / 4) + 4 * (c % 16), code[0] | code[1] << 8 | code[2] << 16 | code[3] << 24);
    } else {
      for (int j = 0; j < GROUP; j++)
        Isa::store_int8(reinterpret_cast<int8_t*>(bytes) + (t + j) * d + c, (Floats)code[j]);
    }
  }
};

// Tokens t..t+3 by code_of(token of the group, channel).
template <class Code>
INLINE void put_codes(const Sink& sink, int t, Code code_of) {
  for (int c = 0; c < sink.d; c += LANES) {
    Ints code[GROUP];
    for (int j = 0; j < GROUP; j++) code[j] = code_of(j, c);
    sink.put(t, c, code);
  }
}

}  // namespace
}  // namespace tersekv::TERSEKV_ISA
