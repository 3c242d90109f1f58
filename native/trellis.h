// The `trellis` recipe: what a block's codes stand for, as one byte a value, in the order in which codes of 8 bits lie.
// The kernels of 8-bit codes do the rest.
//
// The codes of a token are one stream of bits, cut into words of 32, the first bit highest; a value depends on the last
// eight bits up to its own. Keys: a 32-bit lane holds a word of a token, and becomes the windows of four channels.
// Values: 128 bits hold a word of four tokens, and become the windows of four channels of each, turned round.
#pragma once
#include "tile.h"

namespace tersekv::TERSEKV_ISA {

// Where the windows of four channels end: in which word, and how many of its bits follow.
template <int BITS>
struct End {
  int word, after;
  explicit INLINE End(int group)
      : word((4 * BITS * (group + 1) - 1) / 32), after(32 * word + 32 - 4 * BITS * (group + 1)) {}
};

// `look_up`: window of each byte to what is stored. `before`: the words before `now`.
template <int BITS, class LookUp>
void look_up_keys(const LookUp& look_up, const uint8_t* codes, Ahead ahead, int d, uint8_t* out) {
  alignas(64) constexpr uint8_t zeros[64] = {};
  for (int group = 0; group < d / 4; group++) {
    if (group % 2 == 0) ahead(group / 2);
    const End<BITS> end(group);
    const Isa::Ints after = Isa::all(int32_t(end.after));
    for (int i = 0; i < 256; i += Isa::WIDTH) {
      const uint8_t* now = codes + 256 * end.word + i;
      const uint8_t* before = end.word ? now - 256 : zeros;
      const Isa::Ints last = Isa::shifted_in(Isa::load<Isa::Ints>(now), Isa::load<Isa::Ints>(before), after);
      Isa::store(out + 256 * group + i, look_up(Isa::windows<BITS>(last)));
    }
  }
}

// The 128-bit lanes of a register: those below `split` are at `first`, the others at `second`.
template <int BITS, class LookUp>
void look_up_values(const LookUp& look_up, const uint8_t* codes, Ahead ahead, int d, uint8_t* out) {
  constexpr int LANES = Isa::WIDTH / 16;
  alignas(16) constexpr uint8_t zeros[16] = {};
  const int stride = d * BITS / 2;  // of four tokens
  for (int group = 0; group < d / 4; group += LANES) {
    const End<BITS> first(group), last(group + LANES - 1);
    int split = LANES;
    alignas(64) int32_t after[Isa::LANES];
    for (int lane = LANES - 1; lane >= 0; lane--) {
      const End<BITS> end(group + lane);
      if (end.word > first.word) split = lane;
      for (int i = 0; i < 4; i++) after[4 * lane + i] = end.after;
    }
    const Isa::Ints left = Isa::load<Isa::Ints>(after);
    for (int four = 0; four < 16; four++) {
      if (group % 4 == 0 && four % 8 == 0) ahead(group / 2 + four / 8);
      const uint8_t *now = codes + stride * four + 16 * first.word, *later = codes + stride * four + 16 * last.word;
      const Isa::Ints words = Isa::lanes(now, later, split);
      const Isa::Ints before = Isa::lanes(first.word ? now - 16 : zeros, last.word ? later - 16 : zeros, split);
      const Isa::Bytes window = Isa::transposed(Isa::windows<BITS>(Isa::shifted_in(words, before, left)));
      uint8_t* unit = out + 512 * (2 * (group / 4) + four / 8) + 64 * (four % 8) + 16 * (group % 4);
      Isa::store(unit, look_up(window));
    }
  }
}

// Levels 0..127: those of the first 128 windows are kept, and the first bit of a window turns them round.
struct SignedLevels {
  Isa::Bytes128 table;
  explicit SignedLevels(const uint8_t* levels) : table(levels) {}
  INLINE Isa::Bytes operator()(Isa::Bytes window) const { return Isa::turned_round(table(window), window); }
};

// The windows themselves, for a table of floats.
struct Windows {
  INLINE Isa::Bytes operator()(Isa::Bytes window) const { return window; }
};

template <int BITS, class LookUp>
void look_up_trellis(const LookUp& look_up, bool keys, const uint8_t* codes, Ahead ahead, int d, uint8_t* out) {
  keys ? look_up_keys<BITS>(look_up, codes, ahead, d, out) : look_up_values<BITS>(look_up, codes, ahead, d, out);
}

template <int BITS>
void trellis_levels(const uint8_t* levels, bool keys, const uint8_t* codes, Ahead ahead, int d, uint8_t* out) {
  look_up_trellis<BITS>(SignedLevels(levels), keys, codes, ahead, d, out);
}

template <int BITS>
void trellis_windows(const uint8_t*, bool keys, const uint8_t* codes, Ahead ahead, int d, uint8_t* out) {
  look_up_trellis<BITS>(Windows{}, keys, codes, ahead, d, out);
}

}  // namespace tersekv::TERSEKV_ISA
