// Scores of a strip of rows over a tile of blocks to the weights that values are multiplied by. The latencies of
// exponentials and reductions are longer than a block's work, so nothing waits for a row's highest score: exponentials
// are relative to what was highest before, and a tile is done again if a score is far above that.
#pragma once
#include <cmath>

#include "kernels.h"
#include "tile.h"

namespace tersekv::TERSEKV_ISA {

using Quad = Isa::Quad;

constexpr float TINY = 1e-30f;  // what is quantised by a smaller magnitude is 0: 127 over it would be infinite
constexpr float ROOM = 1024;    // a row's exponentials of a tile may add up to as much
// Registers that are raised to a power in step: one after the other, they would fill the queue of what waits.
constexpr int TOGETHER = Isa::REGISTERS / 8;

// R rows from `row` on. ZERO: keys or values have token zeros.
template <int R, bool ZERO>
struct Softmax {
  const Job& job;
  const Queries& q;
  const Block* blocks;
  const int count;  // of blocks
  Sums& sums;
  Strip& strip;
  const int row;
  const Ahead* ahead;  // two for each block, TILE apart
  const bool all_seen;  // every row sees every token of the tile

  // What `attempt` finds, in lanes that are added up later. Not set to zero: 1.4 KB a tile cost more than a row does.
  Floats total[4], common[TILE][4];

  Softmax(const Job& job, const Queries& q, const Block* blocks, int count, Sums& sums, Strip& strip, int row,
          const Ahead* ahead, bool all_seen)
      : job(job), q(q), blocks(blocks), count(count), sums(sums), strip(strip), row(row), ahead(ahead),
        all_seen(all_seen) {}

  // The rare tile at an end of the tokens, or on the diagonal of a chunk.
  __attribute__((noinline)) void find_seen(int64_t at) {
    for (int b = 0; b < count; b++)
      for (int i = 0; i < R; i++) {
        int last = blocks[b].last;
        if (job.tokens.causal) {
          const int64_t seen = job.tokens.length - job.n + (job.first_row + row + i) % job.n + 1 - (at + b * BLOCK);
          if (seen < last) last = seen < 0 ? 0 : int(seen);
        }
        for (int j = 0; j < BLOCK; j++) strip.seen[b][BLOCK * i + j] = j >= blocks[b].first && j < last ? -1 : 0;
      }
  }

  // Scores of a row in a block relative to `top`, in units of log2, from products of codes.
  template <bool ALL_SEEN>
  struct Scores {
    const float *dots, *scale, *zero;
    const int32_t* seen;
    const Floats gain, shift, bias, total;
    INLINE Scores(const Softmax& s, int b, int i, float top)
        : dots(s.strip.scores[b] + BLOCK * i), scale(s.blocks[b].k_scale), zero(s.blocks[b].k_zero),
          seen(s.strip.seen[b] + BLOCK * i), gain(Isa::all(s.blocks[b].q_gain[s.row + i])),
          shift(Isa::all(s.blocks[b].q_shift[s.row + i])), bias(Isa::all(s.blocks[b].bias[s.row + i] - top)),
          total(Isa::all(s.q.total[s.row + i])) {}
    INLINE Floats operator()(int j) const {
      Floats x = (Isa::load<Floats>(dots + j) * gain + shift) * Isa::load<Floats>(scale + j) + bias;
      if (ZERO) x += total * Isa::load<Floats>(zero + j);
      if (!ALL_SEEN) x = Isa::load<Isa::Ints>(seen + j) ? x : Isa::all(-INFINITY);
      return x;
    }
  };

  template <bool ALL_SEEN>
  __attribute__((noinline)) Quad highest(int of) const {
    Floats top[4];
    for (Floats& x : top) x = Isa::all(-INFINITY);
    for (int b = 0; b < of; b++)
      for (int i = 0; i < R; i++) {
        const Scores<ALL_SEEN> score(*this, b, i, 0);
        for (int j = 0; j < BLOCK; j += Isa::LANES) top[i] = Isa::max(top[i], score(j));
      }
    return Isa::highest(top);
  }

  // Exponentials of a block's scores, and the weights: times the values' token scales, which are 0 where nobody sees a
  // token. Returns the largest weight of each row.
  template <bool ALL_SEEN>
  INLINE Quad weights(int b, Quad top) {
    Floats most[4] = {}, mass[4] = {};
    const Block& block = blocks[b];
    float* const out = strip.weights[b];
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) {
      const Scores<ALL_SEEN> score(*this, b, i, top[i]);
      Floats zeros = {};
      for (int first = 0; first < BLOCK; first += TOGETHER * Isa::LANES) {
        Floats x[TOGETHER];
        for (int k = 0; k < TOGETHER; k++) x[k] = score(first + k * Isa::LANES);
        Isa::exp2(x);
        for (int k = 0; k < TOGETHER; k++) {
          const int j = first + k * Isa::LANES;
          const Floats w = x[k] * Isa::load<Floats>(block.v_scale + j);
          if (ZERO) zeros += x[k] * Isa::load<Floats>(block.v_zero + j);
          mass[i] += x[k];
          most[i] = Isa::larger(most[i], w);
          Isa::store(out + BLOCK * i + j, w);
        }
      }
      total[i] += mass[i];
      common[b][i] = zeros;
      ahead[b](i);
      ahead[TILE + b](i);
    }
    if (job.v->channel_zero) Isa::store(strip.mass[b], Isa::sums(mass));
    return Isa::highest(most);
  }

  // Weights to -127..127 of the block's largest; the table's low end adds the same to every channel.
  INLINE void quantise(int b, Quad largest) {
    const Quad step = largest / 127.f, inverse = largest > Quad{} + TINY ? 127.f / largest : Quad{};
    Isa::store(strip.gain[b], step * job.v->step);
    const float* const weights = strip.weights[b];
    int8_t* const int8 = strip.int8[b];
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) {
      Isa::Words all = {};  // of the bits of 12582912, and integers
      for (int j = 0; j < BLOCK; j += Isa::LANES) {
        const Floats x = Isa::rounded(Isa::load<Floats>(weights + BLOCK * i + j) * inverse[i]);
        all += (Isa::Words)x;
        Isa::store_int8(int8 + BLOCK * i + j, x);
      }
      const Floats sum = Isa::to_floats((Isa::Ints)(all - 0x4b400000u * (BLOCK / Isa::LANES)));
      common[b][i] += sum * (step[i] * job.v->low);
    }
  }

  // All of a tile relative to `top`. Returns for which rows that is too low. A block's largest weight is known late, so
  // the block after it comes before what needs it.
  template <bool ALL_SEEN>
  __attribute__((noinline)) Isa::QuadInts attempt(Quad top, bool int8) {
    for (int i = 0; i < 4; i++) total[i] = Floats{};
    Quad before = {};
    for (int b = 0; b < count; b++) {
      const Quad largest = weights<ALL_SEEN>(b, top);
      if (int8 && b) quantise(b - 1, before);
      before = largest;
    }
    if (int8) quantise(count - 1, before);
    return Isa::sums(total) > Quad{} + ROOM;
  }

  Quad highest_of(int of) const { return all_seen ? highest<true>(of) : highest<false>(of); }

  // Raises `top` for rows to which it turns out to be too low. Rows that have seen nothing yet begin with the highest
  // of the first block they see, so that what weights are relative to, and how they round, does not depend on how many
  // blocks a tile has.
  Quad try_all(Quad top, bool int8) {
    const Quad none = Quad{} - INFINITY;
    for (int of = 1; of <= count && Isa::any(top == none); of++) top = top == none ? highest_of(of) : top;
    for (int tries = 0; tries < 2; tries++) {
      const Quad finite = top > none ? top : Quad{};
      const Isa::QuadInts low = all_seen ? attempt<true>(finite, int8) : attempt<false>(finite, int8);
      if (!Isa::any(low)) break;
      top = low ? highest_of(count) : top;
    }
    return top;
  }

  void fade(float* lanes, int i) const { Isa::store(lanes, Isa::load<Floats>(lanes) * strip.fade[i]); }

  void operator()(float* max, int64_t at, bool int8) {
    if (!all_seen) find_seen(at);
    const Quad before = Isa::load<Quad>(max + row), top = try_all(before, int8);
    const Quad fades = top > before ? Isa::power_of_two<Quad, Isa::QuadInts>(before - top) : Quad{} + 1.f;
    Isa::store(max + row, top);
    Isa::store(strip.fade, fades);
    for (int i = 0; i < R && Isa::any(top > before); i++)
      fade(sums.mass + LANES * (row + i), i), fade(sums.common + LANES * (row + i), i);
    for (int i = 0; i < R; i++) Isa::add_to(sums.mass + LANES * (row + i), 1, total[i]);
    if (job.v->channel_scale || job.v->channel_zero) {
      for (int b = 0; b < count; b++) Isa::store(strip.shift[b], Isa::sums(common[b]));
      return;
    }
    for (int i = 0; i < R; i++) {
      Floats all = {};
      for (int b = 0; b < count; b++) all += common[b][i];
      Isa::add_to(sums.common + LANES * (row + i), 1, all);
    }
  }
};

}  // namespace tersekv::TERSEKV_ISA
