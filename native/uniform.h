// Encoding by equal steps between the smallest and the largest value of a token or a channel, and not at all.
#pragma once
#include "rows.h"

namespace tersekv::TERSEKV_ISA {
namespace {

// Scale and zero as they are stored, from a range.
struct Range {
  Quad zero, inverse;
  INLINE Range(const Encoder& e, const Plane& scale_plane, const Plane& zero_plane, int i, Quad low, Quad high,
               uint8_t* out) {
    // The sum with 0 makes a zero positive, whichever of several zeros was found.
    const Quad most = e.symmetric ? Isa::max_quad(-low, high) : high - low;
    const Quad scale = most * e.inverse_top + 0.f;
    put(e, scale_plane, i, scale, out);
    zero = Quad{};
    if (!e.symmetric) {
      put(e, zero_plane, i, low + 0.f, out);
      zero = from_half_bits(half_bits(low + 0.f));
    }
    inverse = ratio(Quad{} + 1.f, from_half_bits(half_bits(scale)));
  }
};

struct Steps {
  Floats low, high;
  Ints first;
  explicit Steps(const Encoder& e)
      : low(Isa::all(float(e.low))), high(Isa::all(float(e.high))), first(Isa::all(0x4b400000 + e.low)) {}
  INLINE Ints operator()(Floats y, Floats zero, Floats inverse) const {
    Floats z = (y - zero) * inverse;
    z = z < high ? z : high;
    return (Ints)Isa::rounded(z > low ? z : low) - first;
  }
};

template <int BITS>
void token_block(const Encoder& e, const Input& in, EncodeScratch& s, uint8_t* out) {
  const Sink sink(e, in, s.codes, AHEAD);
  const Steps steps(e);
  for (int t = 0; t < BLOCK; t += GROUP) {
    load_group(e, in, t, s.y);
    const auto y = [&](int j, int c) EACH_TIME { return Isa::load<Floats>(s.y + j * e.d + c); };
    Floats high[4], low[4];
    for (int j = 0; j < GROUP; j++) {
      high[j] = y(j, 0), low[j] = -y(j, 0);
      for (int c = LANES; c < e.d; c += LANES)
        high[j] = Isa::max(high[j], y(j, c)), low[j] = Isa::max(low[j], -y(j, c));
    }
    const Range range(e, e.scale, e.zero, t, -Isa::highest(low), Isa::highest(high), out);
    put_codes(sink, t, [&](int j, int c) EACH_TIME {
      return steps(y(j, c), Isa::all(range.zero[j]), Isa::all(range.inverse[j]));
    });
  }
  pack_codes<BITS>(e.order, e.d, s.codes, out + e.codes);
}

inline void channel_ranges(const Encoder& e, EncodeScratch& s, uint8_t* out) {
  for (int c = 0; c < e.d; c += LANES) {
    Floats high = Isa::load<Floats>(s.y + c), low = -high;
    for (int t = 1; t < BLOCK; t++) {
      const Floats y = Isa::load<Floats>(s.y + t * e.d + c);
      high = Isa::max(high, y), low = Isa::max(low, -y);
    }
    Isa::store(s.zero + c, -low), Isa::store(s.inverse + c, high);
  }
  for (int c = 0; c < e.d; c += 4) {
    const Quad low = Isa::load<Quad>(s.zero + c), high = Isa::load<Quad>(s.inverse + c);
    const Range range(e, e.channel_scale, e.channel_zero, c, low, high, out);
    Isa::store(s.zero + c, range.zero), Isa::store(s.inverse + c, range.inverse);
  }
}

template <int BITS>
void channel_block(const Encoder& e, const Input& in, EncodeScratch& s, uint8_t* out) {
  const Sink sink(e, in, s.codes, BLOCK);
  const Steps steps(e);
  load_block(e, in, s.y);
  channel_ranges(e, s, out);
  for (int t = 0; t < BLOCK; t += GROUP)
    put_codes(sink, t, [&](int j, int c) EACH_TIME {
      return steps(Isa::load<Floats>(s.y + (t + j) * e.d + c), Isa::load<Floats>(s.zero + c),
                   Isa::load<Floats>(s.inverse + c));
    });
  pack_codes<BITS>(e.order, e.d, s.codes, out + e.codes);
}

inline void dense_block(const Encoder& e, const Input& in, EncodeScratch& s, uint8_t* out) {
  for (int t = 0; t < BLOCK; t += GROUP) {
    load_group(e, in, t, s.y);
    for (int i = 0; i < GROUP * e.d; i += 4) put(e, e.values, t * e.d + i, Isa::load<Quad>(s.y + i), out);
  }
}

}  // namespace
}  // namespace tersekv::TERSEKV_ISA
