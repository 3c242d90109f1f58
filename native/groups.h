// Sides of the `grid` recipe whose numbers are in groups: those of a channel for 16 or 32 tokens, as KIVI's keys have
// them, or those of a token for 16 channels or a multiple, as its values.
//
// The kernels of whole sides do the work. Keys by groups of channels are scores of so many short keys, values by groups
// of channels sums of short values, each with its own weights. Keys by groups of tokens meet 16 tokens with a query of
// their own. Values by groups of tokens, which no published method has, are summed once for each group.
#pragma once
#include "queries.h"
#include "variants.h"

namespace tersekv::TERSEKV_ISA {

class InGroups {
 public:
  InGroups(const Job& job, Scratch& scratch)
      : job_(job), g_(scratch.groups), k_(*job.k), v_(*job.v), d_(job.d),
        keys_(k_.in_groups()), values_(v_.in_groups()),
        k_int8_(!job.exact && k_.bits < 8), v_int8_(!job.exact && v_.bits < 8) {}

  bool keys() const { return keys_; }
  bool values() const { return values_; }
  bool any() const { return keys_ || values_; }

  void begin(const float* scaled) {
    if (k_.in_channel_groups()) prepare_by_channels(scaled);
    for (int i = 0; v_.in_token_groups() && i < BLOCK / v_.tokens_each; i++)
      for (int j = 0; j < BLOCK; j++)
        g_.v_scale[BLOCK * i + j] = g_.v_zero[BLOCK * i + j] = j / v_.tokens_each == i;  // of other groups nothing
  }

  // The planes of a block, of sides that are in groups.
  void read(const Block& block, const float* scaled, const float* log8) {
    if (k_.in_channel_groups()) read_tokens(k_, block.k, log8, BLOCK, g_.k_scale, g_.k_zero);
    if (v_.in_channel_groups()) read_tokens(v_, block.v, log8, block.last, g_.v_scale, g_.v_zero);
    if (v_.in_token_groups()) read_channels(v_, block.v, log8, g_.v_channel_scale, g_.v_channel_zero);
    if (!k_.in_token_groups()) return;
    read_channels(k_, block.k, log8, g_.k_channel_scale, g_.k_channel_zero);
    prepare_by_tokens(scaled);
  }

  // Scores of rows r.. of a strip in units of log2; of the codes' bits `width` says which.
  void score(const uint8_t* codes, int width, Ahead ahead, int r, int rows, float* scores) const {
    k_.in_token_groups() ? score_by_tokens(codes, width, ahead, r, rows, scores)
                         : score_by_channels(codes, width, ahead, r, rows, scores);
  }

  // Adds to out (rows, d) what the strip's weights, exponentials without any scale, make of a block's values.
  void mix(const uint8_t* codes, int width, Ahead ahead, Strip& strip, int rows, float* out) {
    const bool by_tokens = v_.in_token_groups();
    const int wide = v_.channels_each, groups = by_tokens ? BLOCK / v_.tokens_each : d_ / wide;
    for (int i = 0; i < groups; i++) {
      weigh(strip.weights[0], g_.v_scale + BLOCK * i, g_.v_zero + BLOCK * i, rows);
      const int at = by_tokens ? 0 : i;
      const uint8_t* from = codes + at * bytes(wide, width);
      const Ahead later = by_tokens && i ? Ahead{ahead.at, 0, false} : part(ahead, wide, at);
      std::memset(strip.mixed, 0, sizeof(float) * rows * wide);
      if (v_int8_)
        MIX_INT8[width][rows - 1](v_.levels[0], from, later, wide, g_.int8_weights, g_.weight_gain, strip.mixed);
      else MIX_EXACT[width][rows - 1](v_.table, from, later, wide, g_.weights, strip.one, strip.mixed);
      for (int j = 0; j < rows; j++) {
        const float* mixed = strip.mixed + j * wide;
        if (by_tokens) add_by_channel(mixed, i, j, out + j * d_);
        else add(mixed, j, out + j * d_ + i * wide);
      }
    }
  }

 private:
  const Job& job_;
  Groups& g_;
  const Side &k_, &v_;
  const int d_;
  const bool keys_, values_, k_int8_, v_int8_;

  // Of codes of `channels` channels of a block.
  static int bytes(int channels, int width) { return BLOCK / 8 * channels * (width == 4 ? 8 : width + 1); }

  // What a kernel asks for that has the `i`-th so many channels.
  static Ahead part(Ahead ahead, int channels, int i) {
    return {ahead.at + VECTOR * (channels / 8 * i * ahead.each >> 8), ahead.each, ahead.first_level};
  }

  // Numbers of tokens by group; those from `last` on are 0, for what lies there may be a NaN.
  void read_tokens(const Side& s, const uint8_t* from, const float* log8, int last, float* scale, float* zero) {
    const int groups = d_ / s.channels_each;
    const auto read = [&](const Plane& plane, float otherwise, float* to) {
      read_plane(from, plane, BLOCK * groups, log8, otherwise, g_.row_major);
      for (int i = 0; i < groups; i++)
        for (int j = 0; j < BLOCK; j++) to[BLOCK * i + j] = j < last ? g_.row_major[groups * j + i] : 0;
    };
    read(s.scale, 1, scale);
    read(s.zero, 0, zero);
  }

  void read_channels(const Side& s, const uint8_t* from, const float* log8, float* scale, float* zero) const {
    read_plane(from, s.channel_scale, BLOCK / s.tokens_each * d_, log8, 1, scale);
    read_plane(from, s.channel_zero, BLOCK / s.tokens_each * d_, log8, 0, zero);
  }

  // Queries as (group, row, channel of the group): once a job.
  void prepare_by_channels(const float* scaled) {
    const int each = k_.channels_each;
    for (int i = 0; i < d_ / each; i++)
      for (int r = 0; r < job_.rows; r++) {
        const int at = (i * job_.rows + r) * each;
        std::memcpy(g_.folded + at, scaled + r * d_ + i * each, sizeof(float) * each);
        keep(prepared(g_.folded + at, each, k_, k_int8_ ? g_.int8 + at : nullptr), i, r);
      }
  }

  // Queries as (strip, 16 tokens, row of the strip, channel): once a block, for they have its channel scales.
  void prepare_by_tokens(const float* scaled) {
    const int tiles = k_.tokens_each / 16;
    for (int r = 0; r < job_.rows; r++) {
      const int first = r - r % Isa::STRIP, rows = job_.rows - first < Isa::STRIP ? job_.rows - first : Isa::STRIP;
      for (int tile = 0; tile < TOKEN_GROUPS; tile++) {
        const int at = (first * TOKEN_GROUPS + tile * rows + r - first) * d_, before = at - rows * d_;
        if (tile % tiles) {  // as the 16 tokens before
          if (k_int8_) std::memcpy(g_.int8 + at, g_.int8 + before, d_);
          else std::memcpy(g_.folded + at, g_.folded + before, sizeof(float) * d_);
          continue;
        }
        const float bias = fold(scaled + r * d_, tile / tiles, g_.folded + at);
        keep(prepared(g_.folded + at, d_, k_, k_int8_ ? g_.int8 + at : nullptr), tile / tiles, r);
        g_.shift[tile / tiles][r] += bias;
      }
    }
  }

  // A query times the channel scales of a group; returns its product with the channel zeros.
  float fold(const float* row, int group, float* folded) const {
    Floats bias = {};
    for (int c = 0; c < d_; c += Isa::LANES) {
      const Floats x = Isa::load<Floats>(row + c);
      Isa::store(folded + c, x * Isa::load<Floats>(g_.k_channel_scale + group * d_ + c));
      bias += x * Isa::load<Floats>(g_.k_channel_zero + group * d_ + c);
    }
    return Isa::sum(bias);
  }

  void keep(Prepared row, int group, int r) {
    g_.gain[group][r] = row.gain, g_.shift[group][r] = row.shift, g_.total[group][r] = row.total;
  }

  void score_by_tokens(const uint8_t* codes, int width, Ahead ahead, int r, int rows, float* scores) const {
    const int at = r * TOKEN_GROUPS * d_;
    if (k_int8_) SCORE_INT8_IN_GROUPS[width][rows - 1](k_.levels[0], codes, ahead, d_, g_.int8 + at, scores);
    else SCORE_EXACT_IN_GROUPS[width][rows - 1](k_.table, codes, ahead, d_, g_.folded + at, scores);
    for (int i = 0; i < rows; i++)
      for (int j = 0; j < BLOCK; j += Isa::LANES) {
        const int group = j / k_.tokens_each;
        float* at = scores + BLOCK * i + j;
        Isa::store(at, Isa::load<Floats>(at) * Isa::all(g_.gain[group][r + i]) + Isa::all(g_.shift[group][r + i]));
      }
  }

  void score_by_channels(const uint8_t* codes, int width, Ahead ahead, int r, int rows, float* scores) const {
    alignas(64) float dots[STRIP * BLOCK];
    const int wide = k_.channels_each;
    for (int group = 0; group < d_ / wide; group++) {
      const uint8_t* from = codes + group * bytes(wide, width);
      const int at = (group * job_.rows + r) * wide;
      const Ahead later = part(ahead, wide, group);
      if (k_int8_) SCORE_INT8[width][rows - 1](k_.levels[0], from, later, wide, g_.int8 + at, dots);
      else SCORE_EXACT[width][rows - 1](k_.table, from, later, wide, g_.folded + at, dots);
      for (int i = 0; i < rows; i++) {
        const Floats gain = Isa::all(g_.gain[group][r + i]), shift = Isa::all(g_.shift[group][r + i]);
        const Floats total = Isa::all(g_.total[group][r + i]);
        for (int j = 0; j < BLOCK; j += Isa::LANES) {
          Floats x = Isa::load<Floats>(dots + BLOCK * i + j) * gain + shift;
          x *= Isa::load<Floats>(g_.k_scale + BLOCK * group + j);
          x += total * Isa::load<Floats>(g_.k_zero + BLOCK * group + j);
          Isa::store(scores + BLOCK * i + j, group ? Isa::load<Floats>(scores + BLOCK * i + j) + x : x);
        }
      }
    }
  }

  // Weights of one group: exponentials times `scale`, rounded as softmax.h does; `mass`, their sum times `zero`; `low`,
  // what the table's low end and the rounding of weights add to every channel.
  void weigh(const float* exponentials, const float* scale, const float* zero, int rows) {
    Floats most[4] = {}, mass[4] = {}, all[4] = {};
    for (int i = 0; i < rows; i++)
      for (int j = 0; j < BLOCK; j += Isa::LANES) {
        const Floats p = Isa::load<Floats>(exponentials + BLOCK * i + j), w = p * Isa::load<Floats>(scale + j);
        all[i] += w, mass[i] += p * Isa::load<Floats>(zero + j);
        most[i] = Isa::max(most[i], Isa::abs(w));
        Isa::store(g_.weights + BLOCK * i + j, w);
      }
    Isa::store(g_.mass, Isa::sums(mass));
    Isa::store(g_.low, Quad{});
    if (v_int8_) quantise(Isa::highest(most), Isa::sums(all), rows);
  }

  void quantise(Quad largest, Quad all, int rows) {
    const Quad step = largest / 127.f, inverse = largest > Quad{} + TINY ? 127.f / largest : Quad{};
    Floats total[4] = {};
    for (int i = 0; i < rows; i++)
      for (int j = 0; j < BLOCK; j += Isa::LANES) {
        const Floats x = Isa::rounded(Isa::load<Floats>(g_.weights + BLOCK * i + j) * inverse[i]);
        total[i] += x - 12582912.f;
        Isa::store_int8(g_.int8_weights + BLOCK * i + j, x);
      }
    Isa::store(g_.weight_gain, step * v_.step);
    const Quad rounded = Isa::sums(total) * step;
    Isa::store(g_.low, rounded * v_.low + (all - rounded) * v_.middle());
  }

  void add(const float* mixed, int row, float* out) const {
    const Floats all = Isa::all(g_.low[row] + g_.mass[row]);
    for (int c = 0; c < v_.channels_each; c += Isa::LANES)
      Isa::add_to(out + c, 1, Isa::load<Floats>(mixed + c) + all);
  }

  void add_by_channel(const float* mixed, int group, int row, float* out) const {
    const Floats low = Isa::all(g_.low[row]), mass = Isa::all(g_.mass[row]);
    for (int c = 0; c < d_; c += Isa::LANES) {
      const Floats x = (Isa::load<Floats>(mixed + c) + low) * Isa::load<Floats>(g_.v_channel_scale + group * d_ + c);
      Isa::add_to(out + c, 1, x + mass * Isa::load<Floats>(g_.v_channel_zero + group * d_ + c));
    }
  }
};

}  // namespace tersekv::TERSEKV_ISA
