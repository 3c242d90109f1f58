// Codes of tokens one channel after the other, each error passed on to the channels behind: `steered` of
// ops/feedback.py. A token is a lane, so that tokens never meet.
//
// A panel of channels first takes in the errors of all channels before it, from registers, and then those of its own.
// The reference takes an error off all later channels at once; the order for each channel is the same.
#pragma once
#include <algorithm>
#include <utility>

#include "table.h"

namespace tersekv::TERSEKV_ISA {
namespace {

constexpr int PANEL = 4;                                // channels, whose codes are a 32-bit lane
constexpr int STRANDS = Isa::REGISTERS >= 32 ? 4 : 2;  // registers of tokens: PANEL times as many stay in registers

// Lane i of register k and lane k of register i change places.
template <int STEP, int... I>
INLINE void exchange(Ints* x, std::integer_sequence<int, I...>) {
#ifdef __clang__
#define TERSEKV_PICK(FROM) __builtin_shufflevector(a, b, (FROM)...)
#else  // GCC 11 does not know the other
#define TERSEKV_PICK(FROM) __builtin_shuffle(a, b, Ints{(FROM)...})
#endif
  for (int i = 0; i < LANES; i++)
    if (!(i & STEP)) {
      const Ints a = x[i], b = x[i + STEP];
      x[i] = TERSEKV_PICK(I & STEP ? LANES + (I ^ STEP) : I);
      x[i + STEP] = TERSEKV_PICK(I & STEP ? LANES + I : I ^ STEP);
    }
#undef TERSEKV_PICK
}

template <int STEP = 1>
INLINE void transpose(Ints* x) {
  if constexpr (STEP < LANES) {
    exchange<STEP>(x, std::make_integer_sequence<int, LANES>{});
    transpose<2 * STEP>(x);
  }
}

// Tokens to channels of BLOCK tokens.
inline void to_channels(const Encoder& e, const Input& in, float* w) {
  for (int t = 0; t < BLOCK; t += LANES)
    for (int c = 0; c < e.d; c += LANES) {
      Ints x[LANES];
      for (int i = 0; i < LANES; i++) x[i] = Isa::load<Ints>(in.data + (t + i) * in.stride + 4 * c);
      transpose(x);
      for (int i = 0; i < LANES; i++) Isa::store(w + BLOCK * (c + i) + t, x[i]);
    }
}

// Panels of BLOCK tokens, four codes a lane, to tokens.
inline void to_tokens(int d, const uint8_t* words, uint8_t* codes) {
  for (int t = 0; t < BLOCK; t += LANES)
    for (int c = 0; c < d; c += PANEL * LANES) {
      const int left = std::min(LANES, (d - c) / PANEL);
      Ints x[LANES] = {};
      for (int i = 0; i < left; i++) x[i] = Isa::load<Ints>(words + BLOCK * (c + PANEL * i) + 4 * t);
      transpose(x);
      for (int i = 0; i < LANES; i++) {
        uint8_t* to = codes + (t + i) * d + c;
        if (left == LANES) Isa::store(to, x[i]);
        else std::memcpy(to, &x[i], size_t(4 * left));
      }
    }
}

// What a value is coded as, and what that stands for.
template <int BITS>
struct Step {
  const Nearest<BITS> nearest;
  const Isa::Table<BITS> table;
  const Ints first;  // of a table shorter than that of 8 bits, which lies in the middle of one
  explicit Step(const Encoder& e)
      : nearest(e), table(e.centroids), first(Isa::all(int32_t(128 - (1 << (e.bits - 1))))) {}

  // Where the reference searches, a NaN is above all thresholds.
  INLINE Ints operator()(Floats& x) const {
    const Ints code = nearest(x == x ? x : Isa::all(INFINITY));
    x -= table(code);
    if constexpr (BITS < 8) return code;
    return code - first;
  }
};

// STRANDS registers of tokens, as channels, become errors.
template <int BITS>
void steer_strands(const Step<BITS>& step, int d, const float* passed, float* w, uint8_t* words) {
  for (int c = 0; c < d; c += PANEL) {
    Floats x[PANEL][STRANDS];
    for (int k = 0; k < PANEL; k++)
      for (int r = 0; r < STRANDS; r++) x[k][r] = Isa::load<Floats>(w + BLOCK * (c + k) + r * LANES);
    const float* along = passed + c;
    for (const float* error = w; error < w + BLOCK * c; error += BLOCK, along += d)
      for (int k = 0; k < PANEL; k++)
        for (int r = 0; r < STRANDS; r++) x[k][r] -= Isa::all(along[k]) * Isa::load<Floats>(error + r * LANES);
    Ints word[STRANDS] = {};
    for (int k = 0; k < PANEL; k++, along += d)
      for (int r = 0; r < STRANDS; r++) {
        word[r] |= step(x[k][r]) << 8 * k;
        Isa::store(w + BLOCK * (c + k) + r * LANES, x[k][r]);
        for (int later = k + 1; later < PANEL; later++) x[later][r] -= Isa::all(along[later]) * x[k][r];
      }
    for (int r = 0; r < STRANDS; r++) Isa::store(words + BLOCK * c + 4 * r * LANES, word[r]);
  }
}

template <int BITS>
void steer_block(const Encoder& e, const Input& in, const float* passed, EncodeScratch& s, uint8_t* codes) {
  const Step<BITS> step(e);
  to_channels(e, in, s.y);
  for (int t = 0; t < BLOCK; t += STRANDS * LANES) steer_strands(step, e.d, passed, s.y + t, s.rows + 4 * t);
  to_tokens(e.d, s.rows, codes);
}

}  // namespace
}  // namespace tersekv::TERSEKV_ISA
