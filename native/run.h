// Attention of some query rows over some tokens of one KV head, block by block, with a running softmax.
#pragma once
#include "dense.h"
#include "softmax.h"
#include "trellis.h"

namespace tersekv::TERSEKV_ISA {

using ScoreInt8 = void (*)(const uint8_t*, const uint8_t*, Ahead, int, const int8_t*, float*);
using ScoreExact = void (*)(const float*, const uint8_t*, Ahead, int, const float*, float*);
using ScoreDense = void (*)(const uint8_t*, int64_t, int, int, const float*, float*);
using MixInt8 = void (*)(const uint8_t*, const uint8_t*, Ahead, int, const int8_t*, const float*, const float*, float*);
using MixExact = void (*)(const float*, const uint8_t*, Ahead, int, const float*, const float*, const float*, float*);
using MixDense = void (*)(const uint8_t*, int64_t, int, int, const float*, const float*, const float*, float*);

// A strip of R rows at bits B: [bits][rows - 1].
#define STRIPS(F, B) {F<B, 1>, F<B, 2>, F<B, 3>, F<B, 4>}
#define GRID(F) {STRIPS(F, 1), STRIPS(F, 2), STRIPS(F, 3), STRIPS(F, 4), STRIPS(F, 8)}
#define DENSE(F) {STRIPS(F, Kind::fp32), STRIPS(F, Kind::fp16), STRIPS(F, Kind::bf16)}
constexpr ScoreInt8 SCORE_INT8[5][STRIP] = GRID(score_int8);
constexpr MixInt8 MIX_INT8[5][STRIP] = GRID(mix_int8);
constexpr ScoreExact SCORE_EXACT[5][STRIP] = GRID(score_exact);
constexpr MixExact MIX_EXACT[5][STRIP] = GRID(mix_exact);
constexpr ScoreDense SCORE_DENSE[3][STRIP] = DENSE(score_dense);
constexpr MixDense MIX_DENSE[3][STRIP] = DENSE(mix_dense);
constexpr void (*LOOK_UP[4])(const uint8_t*, const uint8_t*, int, uint8_t*) = {
    look_up_block<1>, look_up_block<2>, look_up_block<3>, look_up_block<4>};
// A trellis as levels, or as codes of 8 bits: its windows.
#define EACH_WIDTH(F) {look_up_trellis<1, F>, look_up_trellis<2, F>, look_up_trellis<3, F>, look_up_trellis<4, F>}
constexpr void (*LOOK_UP_TRELLIS[2][4])(const uint8_t*, bool, const uint8_t*, Ahead, int, uint8_t*) = {
    EACH_WIDTH(Windows), EACH_WIDTH(SignedLevels)};
#undef EACH_WIDTH
template <int R, bool ZERO>
void softmax(const Job& job, const Queries& q, const Block* blocks, int count, Sums& sums, Strip& strip, int row,
             const Ahead* ahead, bool all_seen, float* max, int64_t at, bool int8) {
  Softmax<R, ZERO>{job, q, blocks, count, sums, strip, row, ahead, all_seen}(max, at, int8);
}
constexpr decltype(&softmax<1, false>) SOFTMAX[2][STRIP] = {
    {softmax<1, false>, softmax<2, false>, softmax<3, false>, softmax<4, false>},
    {softmax<1, true>, softmax<2, true>, softmax<3, true>, softmax<4, true>}};
#undef STRIPS
#undef GRID
#undef DENSE

inline int of_bits(int bits) { return bits == 8 ? 4 : bits - 1; }
inline int of_kind(Kind kind) { return int(kind) - int(Kind::fp32); }

class Run {
 public:
  Run(const Job& job, Scratch& scratch, Partial out)
      : job_(job), q_(scratch.q), sums_(scratch.sums), blocks_(scratch.block), strip_(scratch.strip),
        log8_(scratch.log8), out_(out), d_(job.d),
        k_int8_(!job.exact && job.k->bits && job.k->bits < 8),
        v_int8_(!job.exact && job.v->bits && job.v->bits < 8),
        shared_(job.rows > 2 * Isa::STRIP) {}

  void operator()() {
    begin();
    const Tokens& t = job_.tokens;
    const int64_t blocks = (t.last + BLOCK - 1) / BLOCK;
    for (int64_t b = t.first / BLOCK; b < blocks; b += TILE) attend_tile(b, int(blocks - b < TILE ? blocks - b : TILE));
    end();
  }

 private:
  const Job& job_;
  Queries& q_;
  Sums& sums_;
  Block* blocks_;
  Strip& strip_;
  const float* log8_;
  Partial out_;
  const int d_;
  const bool k_int8_, v_int8_;
  const bool shared_;  // enough rows that looking a block's codes up once for all of them pays

  void begin() {
    for (int r = 0; r < ROWS + STRIP; r++) out_.max[r] = -INFINITY;
    std::memset(out_.out, 0, sizeof(float) * job_.rows * d_);
    std::memset(sums_.mass, 0, sizeof(float) * LANES * job_.rows);
    std::memset(sums_.common, 0, sizeof(float) * LANES * job_.rows);
    std::memset(strip_.nothing, 0, sizeof strip_.nothing);
    std::memset(strip_.mixed, 0, sizeof(float) * STRIP * d_);
    for (float& x : strip_.one) x = 1;
    for (auto& gain : strip_.gain)
      for (float& x : gain) x = 1;
    const Floats scale = Isa::all(job_.scale * 1.44269504f);
    int i = 0;
    for (; i + Isa::LANES <= job_.rows * d_; i += Isa::LANES)
      Isa::store(q_.scaled + i, Isa::load<Floats>(job_.q + i) * scale);
    for (; i < job_.rows * d_; i++) q_.scaled[i] = job_.q[i] * scale[0];
    if (!job_.k->channel_scale) prepare(q_.scaled);
  }

  void end() {
    for (int r = 0; r < job_.rows; r++) {
      out_.sum[r] = Isa::sum(Isa::load<Floats>(sums_.mass + LANES * r));
      const float common = Isa::sum(Isa::load<Floats>(sums_.common + LANES * r));
      for (int c = 0; c < d_; c++) out_.out[r * d_ + c] += common;
    }
  }

  // The query as the keys' codes want it, and its sums: once a job, or once a block if keys have channel scales.
  void prepare(const float* folded) {
    q_.folded = folded;
    for (int r = 0; r < job_.rows; r++) {
      const float* row = folded + r * d_;
      float total = 0, largest = 0;
      for (int c = 0; c < d_; c++) total += row[c], largest = std::fabs(row[c]) > largest ? std::fabs(row[c]) : largest;
      q_.total[r] = total, q_.gain[r] = 1, q_.shift[r] = 0;
      if (k_int8_) quantise(r, row, largest);
    }
  }

  void quantise(int r, const float* row, float largest) {
    const float inverse = largest > TINY ? 127 / largest : 0, step = largest / 127;
    int total = 0;
    for (int c = 0; c < d_; c++) {
      const int x = int((row[c] * inverse + 12582912.f) - 12582912.f);
      q_.int8[r * d_ + c] = int8_t(x), total += x;
    }
    q_.gain[r] = step * job_.k->step;
    q_.shift[r] = step * job_.k->low * float(total);
  }

  // One step of the running softmax. Keys with channel scales change the query from block to block, and looked-up
  // levels are kept for one block, so such tiles are of one block.
  void attend_tile(int64_t first, int count) {
    const int step = shared_ || job_.k->channel_scale ? 1 : count;
    for (int64_t b = first; b < first + count; b += step) {
      bool whole = !job_.tokens.causal;
      for (int i = 0; i < step; i++) {
        find(blocks_[i], b + i);
        read_planes(blocks_[i]);
        whole = whole && blocks_[i].first <= 0 && blocks_[i].last == BLOCK;
      }
      for (int r = 0; r < job_.rows; r += Isa::STRIP) {
        const int rows = job_.rows - r < Isa::STRIP ? job_.rows - r : Isa::STRIP;
        for (int i = 0; i < step; i++) score(blocks_[i], strip_.scores[i], r, rows);
        Ahead soften[TILE];
        for (int i = 0; i < step; i++) soften[i] = ahead(blocks_[i], 1, r);
        const bool zero = job_.k->zero || job_.v->zero;
        SOFTMAX[zero][rows - 1](job_, q_, blocks_, step, sums_, strip_, r, soften, whole, out_.max, b * BLOCK, v_int8_);
        for (int i = 0; i < step; i++) mix(blocks_[i], i, r, rows);
      }
    }
  }

  void find(Block& block, int64_t index) {
    const Tokens& t = job_.tokens;
    const int64_t at = index * BLOCK;
    block.first = int(t.first - at), block.last = int(t.last - at < BLOCK ? t.last - at : BLOCK);
    block.ahead = nullptr;
    if (!t.table) {
      block.k = t.k + at * t.k_stride, block.v = t.v + at * t.v_stride;
      return;
    }
    const uint8_t* page = t.pool + t.table[index] * t.page_bytes;
    block.ahead = ahead_of(index, page);
    block.k = page + job_.k->start, block.v = page + job_.v->start;
  }

  // The page that is read BLOCKS_AHEAD blocks later, by this job or by the one after it.
  const uint8_t* ahead_of(int64_t index, const uint8_t* page) const {
    const Tokens& t = job_.tokens;
    const int64_t later = index + BLOCKS_AHEAD, beyond = later - (t.last + BLOCK - 1) / BLOCK;
    if (beyond < 0) return t.pool + t.table[later] * t.page_bytes;
    return beyond < t.next_count ? t.pool + t.next[beyond] * t.page_bytes : page;
  }

  // All strips together ask for each line of a page once. The three parts of a strip's work do so in proportion to the
  // time that they take: scores two fifths, softmax one, sums of values two.
  Ahead ahead(const Block& block, int part, int r) const {
    if (!block.ahead) return {nullptr, 0, false};
    const int strip = r / Isa::STRIP, fifths = 5 * ((job_.rows + Isa::STRIP - 1) / Isa::STRIP);
    const int lines = int((job_.tokens.page_bytes + 127) / 64);  // a page may begin in the middle of one
    const int from = lines * (5 * strip + part + (part > 0)) / fifths;
    const int to = lines * (5 * strip + 2 + part + (part == 2)) / fifths;
    const int left = job_.rows - r, steps = part != 1 ? d_ / 8 : left < Isa::STRIP ? left : Isa::STRIP;
    return {block.ahead + 64 * from, (256 * (to - from) + steps - 1) / steps, job_.first_level};
  }

  void read_planes(Block& block) {
    const Side &ks = *job_.k, &vs = *job_.v;
    read_plane(block.k, ks.scale, BLOCK, log8_, 1, block.k_scale);
    read_plane(block.v, vs.scale, BLOCK, log8_, 1, block.v_scale);
    if (ks.zero || vs.zero) {
      read_plane(block.k, ks.zero, BLOCK, log8_, 0, block.k_zero);
      read_plane(block.v, vs.zero, BLOCK, log8_, 0, block.v_zero);
    }
    for (int j = block.last; j < BLOCK; j++) block.v_scale[j] = block.v_zero[j] = 0;  // what lies there may be a NaN
    for (int r = 0; r < job_.rows; r++) block.bias[r] = 0;
    if (ks.channel_zero) {
      read_plane(block.k, ks.channel_zero, d_, log8_, 0, block.channel);
      for (int r = 0; r < job_.rows; r += 4) project(block, r);
    }
    if (ks.channel_scale) {
      read_plane(block.k, ks.channel_scale, d_, log8_, 1, block.channel);
      for (int r = 0; r < job_.rows; r++)
        for (int c = 0; c < d_; c++) q_.by_channel[r * d_ + c] = q_.scaled[r * d_ + c] * block.channel[c];
      prepare(q_.by_channel);
    }
    std::memcpy(block.q_gain, q_.gain, sizeof(float) * job_.rows);
    std::memcpy(block.q_shift, q_.shift, sizeof(float) * job_.rows);
    if (vs.channel_scale || vs.channel_zero) {
      read_plane(block.v, vs.channel_scale, d_, log8_, 1, block.v_channel_scale);
      read_plane(block.v, vs.channel_zero, d_, log8_, 0, block.v_channel_zero);
    }
    if (shared_ && k_int8_ && !ks.trellis) LOOK_UP[ks.bits - 1](ks.levels[0], block.k + ks.codes, d_ / 8, block.k_levels);
    if (shared_ && v_int8_ && !vs.trellis) LOOK_UP[vs.bits - 1](vs.levels[0], block.v + vs.codes, d_ / 8, block.v_levels);
  }

  // Products of four queries with the block's channel zeros. Rows beyond the last one are multiplied in vain.
  void project(Block& block, int r) {
    Floats sum[4] = {};
    for (int c = 0; c < d_; c += Isa::LANES)
      for (int i = 0; i < 4; i++)
        sum[i] += Isa::load<Floats>(q_.scaled + (r + i) * d_ + c) * Isa::load<Floats>(block.channel + c);
    Isa::store(block.bias + r, Isa::sums(sum));
  }

  int64_t dense_stride(const Side& side, int64_t stride) const {
    return job_.tokens.table ? d_ * (side.values.kind == Kind::fp32 ? 4 : 2) : stride;
  }

  // A block of a trellis as bytes, for the first strip of rows; the others find it. A single strip needs it once, so all
  // blocks use the same memory, which stays in the first-level cache.
  const uint8_t* looked_up(const Side& s, const uint8_t* codes, uint8_t* of_block, uint8_t* of_all, bool int8, int r,
                           Ahead& ahead) {
    uint8_t* bytes = job_.rows <= Isa::STRIP ? of_all : of_block;
    if (r) return bytes;
    const Ahead first{ahead.at, (ahead.each + 1) / 2, ahead.first_level};
    LOOK_UP_TRELLIS[int8][s.bits - 1](s.levels[0], &s == job_.k, codes + s.codes, first, d_, bytes);
    ahead = {first.at + VECTOR * (d_ / 8 * first.each >> 8), first.each, first.first_level};
    return bytes;
  }

  void score(Block& block, float* scores, int r, int rows) {
    const Side& s = *job_.k;
    if (s.trellis) {
      Ahead later = ahead(block, 0, r);
      const uint8_t* bytes = looked_up(s, block.k, block.k_levels, blocks_[0].k_levels, k_int8_, r, later);
      if (k_int8_) return SCORE_INT8[of_bits(LOOKED_UP)][rows - 1](s.levels[0], bytes, later, d_, q_.int8 + r * d_, scores);
      return SCORE_EXACT[of_bits(8)][rows - 1](s.table, bytes, later, d_, q_.folded + r * d_, scores);
    }
    const float* q = q_.folded + r * d_;
    const int8_t* int8 = q_.int8 + r * d_;
    if (!s.bits) {
      const uint8_t* keys = block.k + s.values.offset;
      SCORE_DENSE[of_kind(s.values.kind)][rows - 1](keys, dense_stride(s, job_.tokens.k_stride), block.last, d_, q, scores);
    } else if (!k_int8_) {
      SCORE_EXACT[of_bits(s.bits)][rows - 1](s.table, block.k + s.codes, ahead(block, 0, r), d_, q, scores);
    } else if (shared_) {
      SCORE_INT8[of_bits(LOOKED_UP)][rows - 1](s.levels[0], block.k_levels, ahead(block, 0, r), d_, int8, scores);
    } else {
      SCORE_INT8[of_bits(s.bits)][rows - 1](s.levels[0], block.k + s.codes, ahead(block, 0, r), d_, int8, scores);
    }
  }

  void mix(Block& block, int i, int r, int rows) {
    const Side& s = *job_.v;
    const bool by_channel = s.channel_scale || s.channel_zero;
    float* out = by_channel ? strip_.mixed : out_.out + r * d_;
    const float *later = i ? strip_.one : strip_.fade, *fade = by_channel ? strip_.nothing : later;
    const float *gain = strip_.gain[i], *weights = strip_.weights[i];
    if (s.trellis) {
      Ahead ahead = this->ahead(block, 2, r);
      const uint8_t* bytes = looked_up(s, block.v, block.v_levels, blocks_[0].v_levels, v_int8_, r, ahead);
      if (v_int8_) MIX_INT8[of_bits(LOOKED_UP)][rows - 1](s.levels[0], bytes, ahead, d_, strip_.int8[i], fade, gain, out);
      else MIX_EXACT[of_bits(8)][rows - 1](s.table, bytes, ahead, d_, weights, fade, gain, out);
    } else if (!s.bits) {
      const uint8_t* values = block.v + s.values.offset;
      const int64_t stride = dense_stride(s, job_.tokens.v_stride);
      MIX_DENSE[of_kind(s.values.kind)][rows - 1](values, stride, block.last, d_, weights, fade, gain, out);
    } else if (!v_int8_) {
      MIX_EXACT[of_bits(s.bits)][rows - 1](s.table, block.v + s.codes, ahead(block, 2, r), d_, weights, fade, gain, out);
    } else if (shared_) {
      MIX_INT8[of_bits(LOOKED_UP)][rows - 1](s.levels[0], block.v_levels, ahead(block, 2, r), d_, strip_.int8[i], fade, gain, out);
    } else {
      MIX_INT8[of_bits(s.bits)][rows - 1](s.levels[0], block.v + s.codes, ahead(block, 2, r), d_, strip_.int8[i], fade, gain, out);
    }
    if (by_channel) add_by_channel(block, i, later, r, rows);
  }

  // Values with channel planes: out = out * fade + (mixed + shift) * channel scale + mass * channel zero.
  void add_by_channel(const Block& block, int i, const float* fade, int r, int rows) {
    for (int j = 0; j < rows; j++)
      for (int c = 0; c < d_; c++) {
        const float x = (strip_.mixed[j * d_ + c] + strip_.shift[i][j]) * block.v_channel_scale[c];
        float& out = out_.out[(r + j) * d_ + c];
        out = out * fade[j] + x + (job_.v->channel_zero ? strip_.mass[i][j] * block.v_channel_zero[c] : 0.f);
      }
  }
};

}  // namespace tersekv::TERSEKV_ISA
