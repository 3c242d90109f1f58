// Scores of a strip of rows over a tile of blocks to the weights that values are multiplied by. The latencies of
// exponentials and reductions are longer than a block's work: blocks and rows go through each step together, so that
// they overlap.
#pragma once
#include <cmath>

#include "kernels.h"
#include "tile.h"

namespace tersekv::TERSEKV_ISA {

using Quad = Isa::Quad;

constexpr float TINY = 1e-30f;  // what is quantised by a smaller magnitude is 0: 127 over it would be infinite

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

  // Scores in units of log2; returns each row's highest.
  INLINE Quad scores() {
    Floats top[4];
    for (int i = 0; i < 4; i++) top[i] = Isa::all(-INFINITY);
    for (int b = 0; b < count; b++) {
      const Block& block = blocks[b];
      float* const of_block = strip.scores[b];
#pragma GCC unroll 4
      for (int i = 0; i < R; i++) {
        const Floats gain = Isa::all(block.q_gain[row + i]), shift = Isa::all(block.q_shift[row + i]);
        const Floats bias = Isa::all(block.bias[row + i]), total = Isa::all(q.total[row + i]);
        for (int j = 0; j < BLOCK; j += Isa::LANES) {
          float* at = of_block + BLOCK * i + j;
          Floats x = (Isa::load<Floats>(at) * gain + shift) * Isa::load<Floats>(block.k_scale + j) + bias;
          if (ZERO) x += total * Isa::load<Floats>(block.k_zero + j);
          Isa::store(at, x);
          top[i] = Isa::max(top[i], x);
        }
      }
    }
    return Isa::highest(top);
  }

  // The rare tile at an end of the tokens, or on the diagonal of a chunk.
  __attribute__((noinline)) Quad hide_unseen(int64_t at) {
    Quad top = Quad{} - INFINITY;
    for (int b = 0; b < count; b++)
      for (int i = 0; i < R; i++) {
        int last = blocks[b].last;
        if (job.tokens.causal) {
          const int64_t seen = job.tokens.length - job.n + (job.first_row + row + i) % job.n + 1 - (at + b * BLOCK);
          if (seen < last) last = seen < 0 ? 0 : int(seen);
        }
        for (int j = 0; j < BLOCK; j++) {
          float& x = strip.scores[b][BLOCK * i + j];
          if (j < blocks[b].first || j >= last) x = -INFINITY;
          if (x > top[i]) top[i] = x;
        }
      }
    return top;
  }

  // Exponentials, their sums, and the weights: times the values' token scales, which are 0 where nobody sees a token.
  INLINE void weights(Quad top, Quad largest[TILE], Floats common[TILE][4]) {
    Floats total[4] = {};
    for (int b = 0; b < count; b++) {
      Floats most[4] = {}, mass[4] = {};
      const Block& block = blocks[b];
      const float* const scores = strip.scores[b];
      float* const out = strip.weights[b];
#pragma GCC unroll 4
      for (int i = 0; i < R; i++) {
        for (int j = 0; j < BLOCK; j += Isa::LANES) {
          const Floats p = Isa::exp2(Isa::load<Floats>(scores + BLOCK * i + j) - top[i]);
          const Floats w = p * Isa::load<Floats>(block.v_scale + j);
          if (ZERO) common[b][i] += p * Isa::load<Floats>(block.v_zero + j);
          mass[i] += p;
          most[i] = Isa::max(most[i], Isa::abs(w));
          Isa::store(out + BLOCK * i + j, w);
        }
        total[i] += mass[i];
        ahead[b](i);
        ahead[TILE + b](i);
      }
      largest[b] = Isa::highest(most);
      if (job.v->channel_zero) Isa::store(strip.mass[b], Isa::sums(mass));
    }
    for (int i = 0; i < R; i++) Isa::add_to(sums.mass + LANES * (row + i), strip.fade[i], 1, total[i]);
  }

  // Weights to -127..127 of each block's largest; the table's low end adds the same to every channel.
  INLINE void quantise(const Quad largest[TILE], Floats common[TILE][4]) {
    for (int b = 0; b < count; b++) {
      const Quad step = largest[b] / 127.f, inverse = largest[b] > Quad{} + TINY ? 127.f / largest[b] : Quad{};
      Isa::store(strip.gain[b], step * job.v->step);
      const float* const weights = strip.weights[b];
      int8_t* const int8 = strip.int8[b];
#pragma GCC unroll 4
      for (int i = 0; i < R; i++) {
        Floats total = {};
        for (int j = 0; j < BLOCK; j += Isa::LANES) {
          const Floats x = Isa::rounded(Isa::load<Floats>(weights + BLOCK * i + j) * inverse[i]);
          total += x - 12582912.f;
          Isa::store_int8(int8 + BLOCK * i + j, x);
        }
        common[b][i] += total * (step[i] * job.v->low);
      }
    }
  }

  void operator()(float* max, int64_t at, bool int8) {
    Quad highest = scores();
    if (!all_seen) highest = hide_unseen(at);
    const Quad before = Isa::load<Quad>(max + row), now = Isa::max_quad(before, highest);
    const Quad top = now > Quad{} - INFINITY ? now : Quad{};
    Isa::store(max + row, now);
    Isa::store(strip.fade, Isa::power_of_two<Quad, Isa::QuadInts>(before - top));
    Quad largest[TILE];
    Floats common[TILE][4] = {};
    weights(top, largest, common);
    if (int8) quantise(largest, common);
    if (job.v->channel_scale || job.v->channel_zero) {
      for (int b = 0; b < count; b++) Isa::store(strip.shift[b], Isa::sums(common[b]));
      return;
    }
    for (int i = 0; i < R; i++) {
      Floats all = {};
      for (int b = 0; b < count; b++) all += common[b][i];
      Isa::add_to(sums.common + LANES * (row + i), strip.fade[i], 1, all);
    }
  }
};

}  // namespace tersekv::TERSEKV_ISA
