// Encoding by a table: an optional rotation and block mean, unit variance, the nearest entry, and a scale.
#pragma once
#include "rows.h"

namespace tersekv::TERSEKV_ISA {
namespace {

// The code of the nearest entry of an odd-symmetric table. A value on a threshold goes to the smaller magnitude.
template <int BITS>
struct Nearest {
  static constexpr int HALF = 1 << (BITS - 1);
  static constexpr int FEW = BITS <= 3 ? HALF - 1 : 0;
  Floats threshold[FEW + 1];
  Isa::Table<BITS> all, below;
  float bins_per_unit;
  int in_bin;

  explicit Nearest(const Encoder& e)
      : all(e.thresholds), below(reinterpret_cast<const float*>(e.below)), bins_per_unit(e.bins_per_unit),
        in_bin(e.in_bin) {
    for (int i = 0; i < FEW; i++) threshold[i] = Isa::all(e.thresholds[i]);
  }

  INLINE Ints operator()(Floats z) const {
    const Floats size = Isa::abs(z);
    Ints level = Isa::all(int32_t(HALF));
    if constexpr (BITS <= 3) {
      for (int i = 0; i < FEW; i++) level = Isa::count(level, size, threshold[i]);
    } else {
      const Floats top = Isa::all(float(BITS == 4 ? 15 : 255)), at = size * Isa::all(bins_per_unit);
      const Ints first = (Ints)below(Isa::to_ints(at < top ? at : top));
      level += first;
      for (int i = 0; i < in_bin; i++) level = Isa::count(level, size, all(first + i));
    }
    return Isa::flip(level, z, Isa::all(int32_t(2 * HALF - 1)));
  }
};

// Numbers as 8 bits with one step, which is stored, too, and returned.
inline float put_in_steps(const Plane& plane, const float* x, int count, uint8_t* out) {
  Floats top[4] = {};
  for (int i = 0; i < count; i += LANES) top[0] = Isa::max(top[0], Isa::abs(Isa::load<Floats>(x + i)));
  const QuadInts half = half_bits(Isa::highest(top) * float(1.0 / 127));
  const float step = from_half_bits(half)[0], inverse = step > 0 ? 1 / step : 0;
  const uint16_t stored = uint16_t(half[0]);
  std::memcpy(out + plane.step, &stored, 2);
  const Floats limit = Isa::all(127.f);
  for (int i = 0; i < count; i += LANES) {
    Floats steps = Isa::load<Floats>(x + i) * Isa::all(inverse);
    steps = steps < limit ? steps : limit;
    Isa::store_int8(reinterpret_cast<int8_t*>(out + plane.offset + i), Isa::rounded(steps > -limit ? steps : -limit));
  }
  return step;
}

// Scales of a group of tokens: those in steps wait for the largest of the block.
inline void put_scale(const Encoder& e, EncodeScratch& s, int t, const Quad& scale, uint8_t* out) {
  if (e.scale.kind == Kind::int8) Isa::store(s.scale + t, scale);
  else put(e, e.scale, t, scale, out);
}
inline void put_waiting_scales(const Encoder& e, const EncodeScratch& s, uint8_t* out) {
  if (e.scale.kind == Kind::int8) put_in_steps(e.scale, s.scale, BLOCK, out);
}

// Takes the mean of each channel off a block, as it is stored.
inline void subtract_mean(const Encoder& e, EncodeScratch& s, uint8_t* out) {
  for (int c = 0; c < e.d; c += LANES) Isa::store(s.zero + c, token_sum(s.y + c, e.d) * Isa::all(1.f / BLOCK));
  const float step = put_in_steps(e.channel_zero, s.zero, e.d, out);
  for (int c = 0; c < e.d; c += LANES) {
    const Floats zero = Isa::from_int8(out + e.channel_zero.offset + c) * Isa::all(step);
    for (int t = 0; t < BLOCK; t++) {
      float* y = s.y + t * e.d + c;
      Isa::store(y, Isa::load<Floats>(y) - zero);
    }
  }
}

template <int BITS, bool UNBIASED>
void table_block(const Encoder& e, const Input& in, EncodeScratch& s, uint8_t* out) {
  const Nearest<BITS> nearest(e);
  const Isa::Table<BITS> centroids(e.centroids);
  const bool whole = bool(e.channel_zero);
  const Sink sink(e, in, s.codes, whole ? BLOCK : AHEAD);
  if (whole) {
    load_block(e, in, s.y);
    subtract_mean(e, s, out);
  }
  for (int t = 0; t < BLOCK; t += GROUP) {
    float* rows = whole ? s.y + t * e.d : s.y;
    if (!whole) load_group(e, in, t, rows);
    const auto y = [&](int j, int c) EACH_TIME { return Isa::load<Floats>(rows + j * e.d + c); };
    const Quad energy = channel_sums(e.d, [&](int j, int c) EACH_TIME { return y(j, c) * y(j, c); });
    const Quad norm = root(energy), unit = ratio(Quad{} + e.root_d, norm);
    Floats along[GROUP][REGISTERS] = {};
    for (int c = 0; c < e.d; c += 16)
      for (int r = 0; r < REGISTERS; r++) {
        Ints code[GROUP];
        for (int j = 0; j < GROUP; j++) {
          const Floats value = y(j, c + r * LANES);
          code[j] = nearest(value * Isa::all(unit[j]));
          if constexpr (UNBIASED) along[j][r] += value * centroids(code[j]);
        }
        sink.put(t, c + r * LANES, code);
      }
    put_scale(e, s, t, UNBIASED ? ratio(energy, summed(along)) : norm * e.factor, out);
  }
  put_waiting_scales(e, s, out);
  pack_codes<BITS>(e.order, e.d, s.codes, out + e.codes);
}

}  // namespace
}  // namespace tersekv::TERSEKV_ISA
