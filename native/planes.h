// Numbers of a block's planes as floats.
#pragma once
#include "kernels.h"
#include "vector.h"

namespace tersekv::TERSEKV_ISA {

template <Kind KIND>
INLINE Isa::Floats load_floats(const uint8_t* row, int channel) {
  if constexpr (KIND == Kind::fp32) return Isa::load<Isa::Floats>(row + 4 * channel);
  if constexpr (KIND == Kind::fp16) return Isa::from_half(row + 2 * channel);
  return Isa::from_bfloat(row + 2 * channel);
}

template <class Load>
INLINE void fill(int count, float* out, Load load) {
  for (int i = 0; i < count; i += Isa::LANES) Isa::store(out + i, load(i));
}

// Of a plane of integers.
INLINE float step_of(const uint8_t* block, const Plane& plane) {
  uint16_t half = 0x3c00;
  if (plane.step >= 0) std::memcpy(&half, block + plane.step, 2);
  return Isa::half(half);
}

// `count` numbers, rounded up to whole registers: a page is readable, and a scratch array writable, that far. A plane
// that is not there gives `otherwise`.
inline void read_plane(const uint8_t* block, const Plane& plane, int count, const float* log8, float otherwise,
                       float* out) {
  const uint8_t* p = block + plane.offset;
  switch (plane.kind) {
    case Kind::none: return fill(count, out, [=](int) { return Isa::all(otherwise); });
    case Kind::fp32: return fill(count, out, [=](int i) { return load_floats<Kind::fp32>(p, i); });
    case Kind::fp16: return fill(count, out, [=](int i) { return load_floats<Kind::fp16>(p, i); });
    case Kind::bf16: return fill(count, out, [=](int i) { return load_floats<Kind::bf16>(p, i); });
    case Kind::log8: return fill(count, out, [=](int i) { return Isa::from_log8(p + i, log8); });
    case Kind::int8: {
      const float step = step_of(block, plane);
      return fill(count, out, [=](int i) { return Isa::from_int8(p + i) * step; });
    }
  }
}

}  // namespace tersekv::TERSEKV_ISA
