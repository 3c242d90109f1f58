// Numbers into stored bytes: the same roundings and saturations as ops/planes.py.
#pragma once
#include "encode.h"
#include "planes.h"

namespace tersekv::TERSEKV_ISA {
namespace {

using Ints = Isa::Ints;
using Floats = Isa::Floats;
using Quad = Isa::Quad;
using QuadInts = Isa::QuadInts;

INLINE Quad clamped(Quad x, float limit) {
  const Quad top = Quad{} + limit;
  x = x < top ? x : top;
  return x > -top ? x : -top;
}

// fp16 in the low 16 bits: saturates, ties to even.
INLINE QuadInts half_bits(Quad x) {
  const QuadInts bits = (QuadInts)clamped(x, 65504.f), sign = bits & int32_t(0x80000000), size = bits ^ sign;
  const QuadInts normal = (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
  // Below 2^-14 the step is 2^-24, as it is of floats from 1/2 on.
  const QuadInts small = (QuadInts)((Quad)size + 0.5f) - 0x3f000000;
  return (size < 0x38800000 ? small : normal) | (sign >> 16 & 0x8000);
}

INLINE Quad from_half_bits(QuadInts half) {
  return (Quad)((half & 0x7fff) << 13 | (half & 0x8000) << 16) * 5.192296858534828e33f;  // 2^112
}

// bf16 in the low 16 bits: ties to even, infinite beyond its numbers.
INLINE QuadInts bf16_bits(Quad x) {
  const QuadInts bits = (QuadInts)x;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
INLINE QuadInts bfloat_bits(Quad x) { return bf16_bits(clamped(x, 3.3895313892515355e38f)); }  // saturates

INLINE uint8_t log8_code(const Log8& log8, float x) {
  if (!(x >= log8.floor)) return 0;
  x = x < 1024.f ? x : 1024.f;
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  const int below = log8.below[(bits >> 18) - Log8::FIRST];
  return uint8_t(1 + below + (log8.edges[below] < x));
}

// Four numbers of a plane, from element i on.
INLINE void put(const Encoder& e, const Plane& plane, int i, Quad x, uint8_t* block) {
  uint8_t* p = block + plane.offset;
  if (plane.kind == Kind::fp32) return Isa::store(p + 4 * i, clamped(x, 3.4028234663852886e38f));
  if (plane.kind == Kind::log8) {
    for (int k = 0; k < 4; k++) p[i + k] = log8_code(e.log8, x[k]);
    return;
  }
  const QuadInts bits = plane.kind == Kind::fp16 ? half_bits(x) : bfloat_bits(x);
  for (int k = 0; k < 4; k++) {
    const uint16_t two = uint16_t(bits[k]);
    std::memcpy(p + 2 * (i + k), &two, 2);
  }
}

INLINE Quad root(Quad x) {
  for (int k = 0; k < 4; k++) x[k] = __builtin_sqrtf(x[k]);
  return x;
}

// a / b, 0 where b is not positive.
INLINE Quad ratio(Quad a, Quad b) { return b > Quad{} ? a / b : Quad{}; }

}  // namespace
}  // namespace tersekv::TERSEKV_ISA
