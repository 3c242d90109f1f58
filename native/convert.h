// Rows of numbers in fp32, fp16 or bf16 as floats, and floats as such rows: `count` of them, a multiple of 4.
#pragma once
#include "numbers.h"

namespace tersekv::TERSEKV_ISA {
namespace {

template <Kind KIND>
INLINE void load_as(const uint8_t* from, int count, float* to) {
  constexpr int WIDTH = KIND == Kind::fp32 ? 4 : 2;
  const int whole = count - count % Isa::LANES;
  for (int i = 0; i < whole; i += Isa::LANES) Isa::store(to + i, load_floats<KIND>(from, i));
  if (whole == count) return;
  alignas(64) uint8_t rest[4 * Isa::LANES] = {};  // a register may reach beyond the row
  alignas(64) float floats[Isa::LANES];
  std::memcpy(rest, from + WIDTH * whole, size_t(WIDTH * (count - whole)));
  Isa::store(floats, load_floats<KIND>(rest, 0));
  std::memcpy(to + whole, floats, sizeof(float) * size_t(count - whole));
}

inline void load_numbers(const uint8_t* from, Kind kind, int count, float* to) {
  if (kind == Kind::fp32) return load_as<Kind::fp32>(from, count, to);
  if (kind == Kind::fp16) return load_as<Kind::fp16>(from, count, to);
  load_as<Kind::bf16>(from, count, to);
}

// As `half_bits`, but infinite beyond the numbers of fp16.
INLINE QuadInts fp16_bits(Quad x) {
  constexpr int32_t BEYOND = 0x477ff000;  // 65520, halfway from the largest fp16 to what would be the next one
  const QuadInts bits = (QuadInts)x;
  return (bits & 0x7fffffff) >= BEYOND ? 0x7c00 | (bits >> 16 & 0x8000) : half_bits(x);
}

inline void store_numbers(const float* from, Kind kind, int count, uint8_t* to) {
  if (kind == Kind::fp32) {
    std::memcpy(to, from, sizeof(float) * size_t(count));
    return;
  }
  for (int i = 0; i < count; i += 4) {
    const Quad x = Isa::load<Quad>(from + i);
    const QuadInts rounded = kind == Kind::fp16 ? fp16_bits(x) : bf16_bits(x);
    const QuadInts bits = x == x ? rounded : QuadInts{} + 0x7fff;
    for (int k = 0; k < 4; k++) {
      const uint16_t two = uint16_t(bits[k]);
      std::memcpy(to + 2 * (i + k), &two, 2);
    }
  }
}

}  // namespace
}  // namespace tersekv::TERSEKV_ISA
