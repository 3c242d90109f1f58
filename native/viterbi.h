// Encoding by a trellis: block mean, rotation and scale as by a table; codes are those of the walk of least squared error.
//
// Viterbi's algorithm over integers, one token a lane. States are 8 bits; their oldest BITS are the fork, which the next
// code pushes out, and what is left is a head: the 2^BITS states of one head differ in their newest code. A cost is a
// multiple of 2^BITS, plus the fork of its state, so that the least of costs names its fork, the lowest one of equals.
#pragma once
#include <utility>

#include "table.h"

namespace tersekv::TERSEKV_ISA {
namespace {

template <int BITS>
struct Walk {
  static constexpr int STATES = 256, FORKS = 1 << BITS, HEADS = STATES / FORKS;
  static constexpr int32_t UNREACHED = 1 << 30;

  // What is added to a cost: u^2 and -u w, both times FORKS, as products of two pairs of 16-bit numbers.
  int32_t pair[STATES];

  explicit Walk(const Encoder& e) {
    for (int s = 0; s < STATES; s++) pair[s] = e.odd[s] * e.odd[s] | int32_t(uint32_t(-e.odd[s]) << 16);
  }

  // Costs of the states after one more value. `fallen`: HEADS rows of a byte a lane, whose low bits are forks.
  INLINE void step(const Ints* cost, Ints value, Ints* next, uint8_t* fallen) const {
    for (int fork = 0, head = 0; fork < FORKS; fork++)
      for (int i = 0; i < HEADS / FORKS; i++, head++) {
        Ints best = cost[head];
        for (int f = 1; f < FORKS; f++) best = Isa::least(best, cost[f * HEADS + head]);
        Isa::store_int8(reinterpret_cast<int8_t*>(fallen + head * LANES), (Floats)best);
        best = (best & Isa::all(-FORKS)) | Isa::all(int32_t(fork));
        for (int code = 0; code < FORKS; code++)
          next[head * FORKS + code] = Isa::plus_pairs(best, pair[head * FORKS + code], value);
      }
  }

  // LANES tokens: `w` their values, BLOCK apart from channel to channel; `states`: d bytes for each token.
  void operator()(const int32_t* w, int d, TrellisScratch& s, uint8_t* states) const {
    auto* cost = reinterpret_cast<Ints*>(s.cost[0]);
    auto* next = reinterpret_cast<Ints*>(s.cost[1]);
    for (int i = 0; i < STATES; i++) cost[i] = Isa::all(i ? UNREACHED : 0);
    for (int c = 0; c < d; c++, std::swap(cost, next)) {
      const Ints value = Isa::load<Ints>(w + BLOCK * c) << (16 + BITS) | Isa::all(int32_t(FORKS));
      step(cost, value, next, s.fallen + size_t(c) * HEADS * LANES);
    }
    Ints least = cost[0], last = {};
    for (int i = 1; i < STATES; i++) {
      last = cost[i] < least ? Isa::all(i) : last;
      least = Isa::least(least, cost[i]);
    }
    trace(last, d, s.fallen, states);
  }

 private:
  void trace(Ints last, int d, const uint8_t* fallen, uint8_t* states) const {
    alignas(64) int32_t state[LANES];
    Isa::store(state, last);
    for (int c = d - 1; c >= 0; c--)
      for (int lane = 0; lane < LANES; lane++) {
        states[lane * d + c] = uint8_t(state[lane]);
        const int head = state[lane] >> BITS;
        state[lane] = head + HEADS * (fallen[(c * HEADS + head) * LANES + lane] & (FORKS - 1));
      }
  }
};

// Tokens as integers in units of the trellis, channel after channel, and what the scale needs of them.
inline void to_units(const Encoder& e, const float* y, int32_t* w, Quad* energies) {
  for (int t = 0; t < BLOCK; t += GROUP, y += GROUP * e.d) {
    const auto at = [&](int j, int c) EACH_TIME { return Isa::load<Floats>(y + j * e.d + c); };
    const Quad energy = energies[t / GROUP] = channel_sums(e.d, [&](int j, int c) EACH_TIME { return at(j, c) * at(j, c); });
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
    put(e, e.scale, t, e.unbiased ? ratio(energy, channel_sums(e.d, along)) : root(energy) * e.factor, out);
  }
  for (int i = 0; i < BLOCK * e.d; i++) s.rows[i] &= (1 << BITS) - 1;
  each_run(e.order, e.d, [&](int at, int row, int n) { std::memcpy(s.codes + at, s.rows + row, size_t(n)); });
  pack_codes<BITS>(e.order, e.d, s.codes, out + e.codes);
}

}  // namespace
}  // namespace tersekv::TERSEKV_ISA
