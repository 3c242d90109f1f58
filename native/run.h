// Attention of some query rows over some tokens of one KV head, block by block, with a running softmax.
#pragma once
#include <optional>

#include "asking.h"
#include "groups.h"
#include "lookups.h"

namespace tersekv::TERSEKV_ISA {

class Run {
 public:
  Run(const Job& job, Scratch& scratch, Partial out)
      : job_(job), q_(scratch.q), sums_(scratch.sums), blocks_(scratch.block), strips_(scratch.strip),
        products_(scratch.products), groups_(job, scratch),
        k_books_(*job.k, job, scratch.entries.products, scratch.entries.k),
        v_books_(*job.v, job, scratch.entries.weights, scratch.entries.v), log8_(scratch.log8), out_(out), d_(job.d),
        k_int8_(!job.exact && job.k->bits && job.k->bits < 8),
        v_int8_(!job.exact && job.v->bits && job.v->bits < 8),
        shared_(job.rows > 2 * Isa::STRIP),
        group_(shared_ && Isa::MATRIX && !groups_.any() ? STRIPS * STRIP : Isa::STRIP),
        tile_(tile()), planes_first_(tile_ == 1 || k_books_), asking_(job, group_, tile_) {
    if (group_ > Isa::STRIP) matrix_.emplace(least(job.rows, group_), job.d);
  }

  void operator()() {
    begin();
    const Tokens& t = job_.tokens;
    const int64_t blocks = (t.last + BLOCK - 1) / BLOCK;
    for (int64_t b = t.first / BLOCK; b < blocks; b += tile_)
      attend_tile(b, blocks - b < tile_ ? int(blocks - b) : tile_);
    end();
  }

 private:
  static int least(int a, int b) { return a < b ? a : b; }

  const Job& job_;
  Queries& q_;
  Sums& sums_;
  Block* blocks_;
  Strip* strips_;
  Products& products_;
  InGroups groups_;
  const Lookups k_books_, v_books_;
  const float* log8_;
  Partial out_;
  const int d_;
  const bool k_int8_, v_int8_;
  const bool shared_;  // enough rows that looking a block's codes up once for all of them pays
  const int group_;    // query rows that share a pass over a block: a strip, or more where matrices are multiplied
  const int tile_;     // blocks that share a step of the softmax
  // Whether scores need planes. Otherwise planes are read while the products of a block are still being added up.
  const bool planes_first_;
  const Asking asking_;
  std::optional<Isa::Matrix> matrix_;
  static inline const Side NOTHING = {};  // of which no plane is read

  // One block where numbers in groups are its own, where keys with channel scales change the query from block to block,
  // and where levels of more would not stay in the first-level cache; but products of matrices want more. Two where the
  // keys of four and the values asked for meanwhile would not fit.
  int tile() const {
    const bool levels = shared_ && (group_ == Isa::STRIP || k_books_ || v_books_);
    if (levels || job_.k->channel_scale || groups_.any()) return 1;
    const bool codes = job_.k->bits && job_.v->bits;
    return codes && TILE * (job_.k->bytes + job_.v->bytes) > FIRST_LEVEL ? TILE / 2 : TILE;
  }

  void begin() {
    for (int r = 0; r < ROWS + STRIP; r++) out_.max[r] = r < job_.rows ? -INFINITY : 0;
    std::memset(out_.out, 0, sizeof(float) * job_.rows * d_);
    std::memset(sums_.mass, 0, sizeof(float) * LANES * job_.rows);
    std::memset(sums_.common, 0, sizeof(float) * LANES * job_.rows);
    for (int i = 0; i < group_; i += STRIP) {
      Strip& strip = strips_[i / STRIP];
      std::memset(strip.mixed, 0, sizeof(float) * STRIP * d_);
      for (float& x : strip.one) x = 1;
      for (auto& gain : strip.gain)
        for (float& x : gain) x = 1;
    }
    const Floats scale = Isa::all(job_.scale * 1.44269504f);
    int i = 0;
    for (; i + Isa::LANES <= job_.rows * d_; i += Isa::LANES)
      Isa::store(q_.scaled + i, Isa::load<Floats>(job_.q + i) * scale);
    for (; i < job_.rows * d_; i++) q_.scaled[i] = job_.q[i] * scale[0];
    if (!job_.k->channel_scale) prepare(q_.scaled);
    groups_.begin(q_.scaled);
    each_strip_of_books([&](int strip, int r, int rows) {
      if (k_books_) k_books_.multiply(q_.scaled + r * d_, rows, strip);
      if (v_books_) v_books_.clear(strip);
    });
  }

  // Strips that keep something of all entries of a book.
  template <class Visit>
  void each_strip_of_books(Visit visit) {
    if (shared_ || !(k_books_ || v_books_)) return;
    for (int r = 0; r < job_.rows; r += Isa::STRIP) visit(r / Isa::STRIP, r, least(Isa::STRIP, job_.rows - r));
  }

  void end() {
    each_strip_of_books([&](int strip, int r, int rows) {
      if (v_books_) v_books_.add_entries(strip, rows, out_.out + r * d_);
    });
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
      const Prepared row = prepared(folded + r * d_, d_, *job_.k, k_int8_ ? q_.int8 + r * d_ : nullptr);
      q_.total[r] = row.total, q_.gain[r] = row.gain, q_.shift[r] = row.shift;
    }
  }

  // One step of the running softmax.
  void attend_tile(int64_t first, int count) {
    bool whole = !job_.tokens.causal;
    for (int i = 0; i < count; i++) {
      find(blocks_[i], first + i);
      if (planes_first_) read_planes(blocks_[i]);
      whole = whole && blocks_[i].first <= 0 && blocks_[i].last == BLOCK;
    }
    for (int r = 0; r < job_.rows; r += group_) {
      const int rows = least(group_, job_.rows - r);
      for (int i = 0; i < count; i++) {
        score(blocks_[i], i, r, rows);
        if (r == 0 && !planes_first_) read_planes(blocks_[i]);
      }
      for (int j = 0; j < rows; j += Isa::STRIP)
        soften(count, first, r + j, least(Isa::STRIP, rows - j), whole, strips_[j / STRIP]);
      for (int i = 0; i < count; i++) mix(blocks_[i], i, r, rows);
    }
  }

  void soften(int step, int64_t b, int r, int rows, bool whole, Strip& strip) {
    Ahead later[2 * TILE];
    for (int i = 0; i < step; i++) {
      later[i] = asking_.during(SOFTENING, blocks_[i], r);
      later[TILE + i] = asking_.during(SOFTENING_TOO, blocks_[i], r);
    }
    const bool zero = (job_.k->zero && !groups_.keys()) || (job_.v->zero && !groups_.values());
    SOFTMAX[zero][rows - 1](job_, q_, blocks_, step, sums_, strip, r, later, whole, out_.max, b * BLOCK,
                            v_int8_ && !groups_.values());
    for (int j = 0; j < rows; j++)
      if (strip.fade[j] != 1)
        for (int c = 0; c < d_; c++) out_.out[(r + j) * d_ + c] *= strip.fade[j];
  }

  void find(Block& block, int64_t index) {
    const Tokens& t = job_.tokens;
    const int64_t at = index * BLOCK;
    block.first = int(t.first - at), block.last = int(t.last - at < BLOCK ? t.last - at : BLOCK);
    block.ahead[0] = block.ahead[1] = nullptr;
    if (!t.table) {
      block.k = t.k + at * t.k_stride, block.v = t.v + at * t.v_stride;
      return;
    }
    const uint8_t* page = t.pool + t.table[index] * t.page_bytes;
    asking_.find(block, index);
    block.k = page + job_.k->start, block.v = page + job_.v->start;
  }

  void read_planes(Block& block) {
    const Side &ks = groups_.keys() ? NOTHING : *job_.k, &vs = groups_.values() ? NOTHING : *job_.v;
    if (k_books_) k_books_.read(block.k, block.k_levels);
    if (v_books_) v_books_.read(block.v, block.v_levels);
    if (groups_.any()) groups_.read(block, q_.scaled, log8_);
    read_plane(block.k, ks.scale, BLOCK, log8_, 1, block.k_scale);
    read_plane(block.v, vs.scale, BLOCK, log8_, 1, block.v_scale);
    if (ks.zero || vs.zero) {
      read_plane(block.k, ks.zero, BLOCK, log8_, 0, block.k_zero);
      read_plane(block.v, vs.zero, BLOCK, log8_, 0, block.v_zero);
    }
    for (int j = block.last; j < BLOCK; j++) block.v_scale[j] = block.v_zero[j] = 0;  // what lies there may be a NaN
    for (int r = 0; r < job_.rows; r += 4)
      Isa::store(block.bias + r, ks.channel_zero ? project(block, r) : Quad{});
    if (ks.channel_scale) {
      read_plane(block.k, ks.channel_scale, d_, log8_, 1, block.channel);
      for (int r = 0; r < job_.rows; r++)
        for (int c = 0; c < d_; c++) q_.by_channel[r * d_ + c] = q_.scaled[r * d_ + c] * block.channel[c];
      prepare(q_.by_channel);
    }
    for (int r = 0; r < job_.rows; r += 4) {
      Isa::store(block.q_gain + r, Isa::load<Quad>(q_.gain + r));
      Isa::store(block.q_shift + r, Isa::load<Quad>(q_.shift + r));
    }
    if (ks.channels_first)
      for (int r = 0; r < job_.rows; r++) block.q_shift[r] += block.bias[r], block.bias[r] = 0;
    if (groups_.keys())
      for (int r = 0; r < job_.rows; r++) block.q_gain[r] = 1, block.q_shift[r] = q_.total[r] = 0;
    if (vs.channel_scale || vs.channel_zero) {
      read_plane(block.v, vs.channel_scale, d_, log8_, 1, block.v_channel_scale);
      read_plane(block.v, vs.channel_zero, d_, log8_, 0, block.v_channel_zero);
    }
  }

  // Products of four queries with the block's channel zeros. Rows beyond the last one are multiplied in vain.
  Quad project(Block& block, int r) {
    const Plane& zero = job_.k->channel_zero;
    const bool int8 = zero.kind == Kind::int8;  // as most pages have them: read once, and multiplied as integers
    if (!int8 && r == 0) read_plane(block.k, zero, d_, log8_, 0, block.channel);
    Floats sum[4] = {};
    for (int c = 0; c < d_; c += Isa::LANES) {
      const Floats x = int8 ? Isa::from_int8(block.k + zero.offset + c) : Isa::load<Floats>(block.channel + c);
      for (int i = 0; i < 4; i++) sum[i] += Isa::load<Floats>(q_.scaled + (r + i) * d_ + c) * x;
    }
    return Isa::sums(sum) * (int8 ? step_of(block.k, zero) : 1);
  }

  static float sum_of(const float* weights) {
    Floats sum = {};
    for (int j = 0; j < BLOCK; j += Isa::LANES) sum += Isa::load<Floats>(weights + j);
    return Isa::sum(sum);
  }

  int64_t dense_stride(const Side& side, int64_t stride) const {
    return job_.tokens.table ? d_ * (side.values.kind == Kind::fp32 ? 4 : 2) : stride;
  }

  // A side of a block as bytes, if that is how it is read: looked up for the first group of rows, the others find it. A
  // single group needs it once, so all blocks use the same memory, which stays in the first-level cache.
  const uint8_t* bytes(const Side& s, bool int8, const uint8_t* from, uint8_t* of_block, uint8_t* of_all, int r,
                       Ahead& ahead) {
    if (!s.trellis && !(int8 && shared_)) return nullptr;
    uint8_t* found = job_.rows <= group_ ? of_all : of_block;
    if (r) return found;
    const Ahead first{ahead.at, matrix_ ? ahead.each : (ahead.each + 1) / 2, ahead.first_level};
    LOOK_UP[s.trellis ? 2 - int8 : 0][s.bits - 1](s.levels[0], &s == job_.k, from + s.codes, first, d_, found);
    ahead = {first.at + VECTOR * (d_ / 8 * first.each >> 8), matrix_ ? 0 : first.each, ahead.first_level};
    return found;
  }

  void score(Block& block, int i, int r, int rows) {
    Ahead later = asking_.during(SCORES, block, r);
    const uint8_t* levels = bytes(*job_.k, k_int8_, block.k, block.k_levels, blocks_[0].k_levels, r, later);
    if constexpr (Isa::MATRIX)
      if (matrix_ && k_int8_) return score_matrix(*matrix_, levels, d_, q_.int8 + r * d_, rows, i, products_, strips_);
    for (int j = 0; j < rows; j += Isa::STRIP, later.each = 0)
      score_strip(block, levels, later, r + j, least(Isa::STRIP, rows - j), strips_[j / STRIP].scores[i]);
  }

  void score_strip(const Block& block, const uint8_t* levels, Ahead ahead, int r, int rows, float* scores) {
    const Side& s = *job_.k;
    const uint8_t* codes = levels ? levels : block.k + s.codes;
    const int width = of_bits(levels ? LOOKED_UP : s.bits);
    if (groups_.keys()) return groups_.score(codes, width, ahead, r, rows, scores);
    const float* q = q_.folded + r * d_;
    if (k_books_) {
      for (int u = 0; u < d_ / 8; u++) ahead(u);
      if (!shared_) return k_books_.score(block.k_levels, r / Isa::STRIP, rows, scores);
      if (r == 0) k_books_.decode(block.k_levels);
      SCORE_DENSE[0][rows - 1](k_books_.decoded(), 4 * d_, block.last, d_, q, scores);
    } else if (!s.bits) {
      const uint8_t* keys = block.k + s.values.offset;
      const int64_t stride = dense_stride(s, job_.tokens.k_stride);
      SCORE_DENSE[of_kind(s.values.kind)][rows - 1](keys, stride, block.last, d_, q, scores);
    } else if (k_int8_) {
      SCORE_INT8[width][rows - 1](s.levels[0], codes, ahead, d_, q_.int8 + r * d_, scores);
    } else {
      SCORE_EXACT[width][rows - 1](s.table, codes, ahead, d_, q, scores);
    }
  }

  void mix(Block& block, int i, int r, int rows) {
    Ahead later = asking_.during(SUMS, block, r);
    const uint8_t* levels = bytes(*job_.v, v_int8_, block.v, block.v_levels, blocks_[0].v_levels, r, later);
    if constexpr (Isa::MATRIX)
      if (matrix_ && v_int8_) mix_matrix(*matrix_, levels, d_, rows, i, strips_, products_);
    for (int j = 0; j < rows; j += Isa::STRIP, later.each = 0)
      mix_strip(block, levels, later, i, r + j, least(Isa::STRIP, rows - j), strips_[j / STRIP],
                products_.sums + j * d_);
  }

  void mix_strip(const Block& block, const uint8_t* levels, Ahead ahead, int i, int r, int rows, Strip& strip,
                 const int32_t* sums) {
    const Side& s = *job_.v;
    const bool by_channel = s.channel_scale || s.channel_zero;
    float* out = by_channel ? strip.mixed : out_.out + r * d_;
    if (by_channel) std::memset(out, 0, sizeof(float) * rows * d_);
    const float *gain = strip.gain[i], *weights = strip.weights[i];
    const uint8_t* codes = levels ? levels : block.v + s.codes;
    const int width = of_bits(levels ? LOOKED_UP : s.bits);
    if (groups_.values()) return groups_.mix(codes, width, ahead, strip, rows, out_.out + r * d_);
    if (v_books_) {
      for (int u = 0; u < d_ / 8; u++) ahead(u);
      if (shared_ && r == 0) v_books_.decode(block.v_levels);
      if (shared_) MIX_DENSE[0][rows - 1](v_books_.decoded(), 4 * d_, block.last, d_, weights, gain, out);
      else v_books_.add_weights(block.v_levels, r / Isa::STRIP, rows, weights, i ? strip.one : strip.fade);
    } else if (!s.bits) {
      const uint8_t* values = block.v + s.values.offset;
      const int64_t stride = dense_stride(s, job_.tokens.v_stride);
      MIX_DENSE[of_kind(s.values.kind)][rows - 1](values, stride, block.last, d_, weights, gain, out);
    } else if (matrix_ && v_int8_) {
      add_products(sums, d_, rows, gain, out);
    } else if (v_int8_) {
      MIX_INT8[width][rows - 1](s.levels[0], codes, ahead, d_, strip.int8[i], gain, out);
    } else {
      MIX_EXACT[width][rows - 1](s.table, codes, ahead, d_, weights, gain, out);
    }
    if (s.channels_first)
      for (int j = 0; j < rows; j++) strip.mass[i][j] = sum_of(weights + BLOCK * j);
    if (by_channel) add_by_channel(block, strip, i, r, rows);
  }

  // Values with channel planes: out += (mixed + shift) * channel scale + mass * channel zero.
  void add_by_channel(const Block& block, const Strip& strip, int i, int r, int rows) {
    for (int j = 0; j < rows; j++)
      for (int c = 0; c < d_; c++) {
        const float x = (strip.mixed[j * d_ + c] + strip.shift[i][j]) * block.v_channel_scale[c];
        out_.out[(r + j) * d_ + c] += x + (job_.v->channel_zero ? strip.mass[i][j] * block.v_channel_zero[c] : 0.f);
      }
  }
};

}  // namespace tersekv::TERSEKV_ISA
