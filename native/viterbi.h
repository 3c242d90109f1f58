// Encoding by a trellis: block mean, rotation and scale as by a table; codes are those of the walk of least squared
// error.
//
// Viterbi's algorithm over integers, one token a lane. States are 8 bits; their oldest BITS are the fork, which the
// next code pushes out, and what is left is a head: the 2^BITS states of one head differ in their newest code. A cost
// is a multiple of 2^BITS, plus the fork of its state, so that the least of costs names its fork, the lowest one of
// equals.
#pragma once
#include <utility>

#include "table.h"

namespace tersekv::TERSEKV_ISA {
namespace {

// f(0), f(1), ... with constants, so that arrays which they index can be registers.
template <class F, int... I>
INLINE void each_of(std::integer_sequence<int, I...>, F f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int COUNT, class F>
INLINE void repeated(F f) {
  each_of(std::make_integer_sequence<int, COUNT>{}, f);
}

// States that differ in their oldest OLD bits stay among themselves for STEPS values, which replace these bits: they
// are read and written once. The bits between are the number of such a group.
template <int BITS>
struct Walk {
  static constexpr int STATES = 256, FORKS = 1 << BITS, HEADS = STATES / FORKS;
  static constexpr int STEPS = BITS <= 2 ? 4 / BITS : 1, OLD = STEPS * BITS, SIZE = 1 << OLD, GROUPS = STATES / SIZE;
  static constexpr int EACH = SIZE / FORKS;  // heads of a group
  static constexpr int32_t UNREACHED = 1 << 30;

  // What is added to a cost: u^2 and -u w, both times FORKS, as products of two pairs of 16-bit numbers.
  int32_t pair[STATES];

  explicit Walk(const Encoder& e) {
    for (int s = 0; s < STATES; s++) pair[s] = e.odd[s] * e.odd[s] | int32_t(uint32_t(-e.odd[s]) << 16);
  }

  // Head `i` of a group before value `step`: bits that are still old, the group, bits that are new.
  static INLINE int head_of(int group, int i, int step) {
    const int made = BITS * step;
    return (i >> made) * (GROUPS << made) + (group << made) + (i & ((1 << made) - 1));
  }
  // Of every EACH-th.
  template <int COUNT>
  static INLINE Ints least_of(const Ints* x) {
    if constexpr (COUNT == 1) return *x;
    else return Isa::least(least_of<COUNT / 2>(x), least_of<COUNT / 2>(x + COUNT / 2 * EACH));
  }

  template <int STEP>
  INLINE void one_value(Ints* x, int group, Ints value, Ints& forks, uint8_t* fallen) const {
    Ints next[SIZE];
    repeated<EACH>([&](auto i) EACH_TIME {
      Ints best = least_of<FORKS>(x + i);
      forks = Isa::bytes_in(forks, best);
      const int head = head_of(group, i, STEP), place = group * EACH + i;
      if (place % 4 == 3) Isa::store(fallen + place / 4 * 4 * LANES, forks);
      best = (best & Isa::all(-FORKS)) | Isa::all(int32_t(head * FORKS / HEADS));
      const int32_t* pairs = pair + head * FORKS;
      repeated<FORKS>([&](auto code) EACH_TIME { next[i * FORKS + code] = Isa::plus_pairs(best, pairs[code], value); });
    });
    repeated<SIZE>([&](auto i) EACH_TIME { x[i] = next[i]; });
  }

  template <int STEP = 0>
  INLINE void all_values(Ints* x, int group, const Ints* value, Ints& forks, uint8_t* fallen) const {
    if constexpr (STEP < STEPS) {
      one_value<STEP>(x, group, value[STEP], forks, fallen + size_t(STEP) * HEADS * LANES);
      all_values<STEP + 1>(x, group, value, forks, fallen);
    }
  }

  // Costs of the states after STEPS more values.
  void step(const Ints* cost, const Ints* value, Ints* next, uint8_t* fallen) const {
    Ints forks = {};
    for (int group = 0; group < GROUPS; group++) {
      Ints x[SIZE];
      repeated<SIZE>([&](auto i) EACH_TIME { x[i] = cost[i * GROUPS + group]; });
      all_values(x, group, value, forks, fallen);
      repeated<SIZE>([&](auto i) EACH_TIME { next[group * SIZE + i] = x[i]; });
    }
  }

  // LANES tokens: `w` their values, BLOCK apart from channel to channel; `states`: d bytes for each token.
  void operator()(const int32_t* w, int d, TrellisScratch& s, uint8_t* states) const {
    auto* cost = reinterpret_cast<Ints*>(s.cost[0]);
    auto* next = reinterpret_cast<Ints*>(s.cost[1]);
    for (int i = 0; i < STATES; i++) cost[i] = Isa::all(i ? UNREACHED : 0);
    for (int c = 0; c < d; c += STEPS, std::swap(cost, next)) {
      Ints value[STEPS];
      for (int i = 0; i < STEPS; i++)
        value[i] = Isa::load<Ints>(w + BLOCK * (c + i)) << (16 + BITS) | Isa::all(int32_t(FORKS));
      step(cost, value, next, s.fallen + size_t(c) * HEADS * LANES);
    }
    Ints least = cost[0], last = {};
    for (int i = 1; i < STATES; i++) {
      last = cost[i] < least ? Isa::all(i) : last;
      least = Isa::least(least, cost[i]);
    }
    for (int c = d; c > 0;) trace(last, c, s.fallen, s.states);
    for (int lane = 0; lane < LANES; lane++)
      for (int c = 0; c < d; c++) states[lane * d + c] = s.states[c * LANES + lane];
  }

 private:
  // From the states after channel c - 1 to those STEPS earlier. A fork is one of the four bytes of a lane.
  template <int STEP = STEPS - 1>
  INLINE void trace(Ints& state, int& c, const uint8_t* fallen, uint8_t* states) const {
    c--;
    Isa::store_int8(reinterpret_cast<int8_t*>(states + c * LANES), (Floats)state);
    constexpr int MADE = BITS * STEP;
    const Ints head = state >> BITS, group = head >> MADE & (GROUPS - 1);
    const Ints place = group * EACH + (head >> (MADE + 8 - OLD) << MADE | (head & ((1 << MADE) - 1)));
    const Ints four = Isa::gathered(fallen + size_t(c) * HEADS * LANES, place >> 2);
    state = head + (four >> ((place & 3) << 3) & (FORKS - 1)) * HEADS;
    if constexpr (STEP > 0) trace<STEP - 1>(state, c, fallen, states);
  }
};

// Tokens as integers in units of the trellis, channel after channel, and what the scale needs of them.
inline void to_units(const Encoder& e, const float* y, int32_t* w, Quad* energies) {
  for (int t = 0; t < BLOCK; t += GROUP, y += GROUP * e.d) {
    const auto at = [&](int j, int c) EACH_TIME { return Isa::load<Floats>(y + j * e.d + c); };
    const auto square = [&](int j, int c) EACH_TIME { return at(j, c) * at(j, c); };
    const Quad energy = energies[t / GROUP] = channel_sums(e.d, square);
    const Quad unit = ratio(Quad{} + e.root_d, root(energy));
    for (int c = 0; c < e.d; c += LANES)
      for (int j = 0; j < GROUP; j++) {
        const Ints x = (Ints)Isa::rounded(at(j, c) * Isa::all(unit[j]) * Isa::all(e.per_unit)) - Isa::all(0x4b400000);
        for (int i = 0; i < LANES; i++) w[BLOCK * (c + i) + t + j] = x[i];
      }
  }
}

template <int BITS>
void trellis_block(const Encoder& e, const Input& in, EncodeScratch& s, uint8_t* out) {
  load_block(e, in, s.y);
  if (e.channel_zero) subtract_mean(e, s, out);
  Quad energies[BLOCK / GROUP];
  to_units(e, s.y, s.trellis.w, energies);
  const Walk<BITS> walk(e);
  for (int t = 0; t < BLOCK; t += LANES) walk(s.trellis.w + t, e.d, s.trellis, s.rows + t * e.d);
  const Isa::Table<8> centroids(e.centroids);
  for (int t = 0; t < BLOCK; t += GROUP) {
    const auto along = [&](int j, int c) EACH_TIME {
      return Isa::load<Floats>(s.y + (t + j) * e.d + c) * centroids(Isa::from_bytes(s.rows + (t + j) * e.d + c));
    };
    const Quad energy = energies[t / GROUP];
    put_scale(e, s, t, e.unbiased ? ratio(energy, channel_sums(e.d, along)) : root(energy) * e.factor, out);
  }
  put_waiting_scales(e, s, out);
  for (int i = 0; i < BLOCK * e.d; i++) s.rows[i] &= (1 << BITS) - 1;
  each_run(e.order, e.d, [&](int at, int row, int n) { std::memcpy(s.codes + at, s.rows + row, size_t(n)); });
  pack_codes<BITS>(e.order, e.d, s.codes, out + e.codes);
}

}  // namespace
}  // namespace tersekv::TERSEKV_ISA
