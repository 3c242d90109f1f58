// The signed Hadamard rotation of one row. The order of the butterflies, strides 1, 2, 4, ..., is part of the format.
#pragma once
#include <cmath>

#include "encode.h"
#include "vector.h"

namespace tersekv::TERSEKV_ISA {
namespace {

// Sums and differences of registers `STRIDE` apart, and on to the largest stride.
template <int COUNT, int STRIDE = 1>
INLINE void butterflies(Isa::Floats* x) {
  if constexpr (STRIDE < COUNT) {
    for (int i = 0; i < COUNT; i++)
      if (!(i & STRIDE)) {
        const Isa::Floats a = x[i], b = x[i + STRIDE];
        x[i] = a + b, x[i + STRIDE] = a - b;
      }
    butterflies<COUNT, 2 * STRIDE>(x);
  }
}

// COUNT registers of a row: all strides within them.
template <int COUNT>
INLINE void near_strides(const float* x, const float* before, float scale, const float* after, float* y) {
  constexpr int LANES = Isa::LANES;
  Isa::Floats r[COUNT];
  for (int i = 0; i < COUNT; i++) {
    r[i] = Isa::load<Isa::Floats>(x + LANES * i);
    if (before) r[i] *= Isa::load<Isa::Floats>(before + LANES * i);
    r[i] = Isa::hadamard(r[i]);
  }
  butterflies<COUNT>(r);
  for (int i = 0; i < COUNT; i++) {
    r[i] *= Isa::all(scale);
    if (after) r[i] *= Isa::load<Isa::Floats>(after + LANES * i);
    Isa::store(y + LANES * i, r[i]);
  }
}

// Strides from `stride` on, over memory.
inline void far_strides(float* y, int size, int stride) {
  for (; stride < size; stride *= 2)
    for (int i = 0; i < size; i += Isa::LANES)
      if (!(i & stride)) {
        const auto a = Isa::load<Isa::Floats>(y + i), b = Isa::load<Isa::Floats>(y + i + stride);
        Isa::store(y + i, a + b), Isa::store(y + i + stride, a - b);
      }
}

template <int COUNT>
void rotate_by(const float* x, int d, int size, const float* before, const float* after, float* y) {
  constexpr int NEAR = COUNT * Isa::LANES;
  const float scale = 1 / std::sqrt(float(size));
  if (size == NEAR) {
    for (int i = 0; i < d; i += NEAR)
      near_strides<COUNT>(x + i, before ? before + i : before, scale, after ? after + i : after, y + i);
    return;
  }
  for (int i = 0; i < d; i += NEAR) near_strides<COUNT>(x + i, before ? before + i : before, 1, nullptr, y + i);
  for (int i = 0; i < d; i += size) far_strides(y + i, size, NEAR);
  for (int i = 0; i < d; i += Isa::LANES) {
    Isa::Floats v = Isa::load<Isa::Floats>(y + i) * Isa::all(scale);
    if (after) v *= Isa::load<Isa::Floats>(after + i);
    Isa::store(y + i, v);
  }
}

// y may be x. d is a multiple of 16, so that a Hadamard block fills the widest register.
inline void rotate_row(const float* x, int d, const float* before, const float* after, float* y) {
  const int size = d & -d, registers = size / Isa::LANES;
  if (registers >= 8) return rotate_by<8>(x, d, size, before, after, y);
  if (registers == 4) return rotate_by<4>(x, d, size, before, after, y);
  if (registers == 2) return rotate_by<2>(x, d, size, before, after, y);
  rotate_by<1>(x, d, size, before, after, y);
}

}  // namespace
}  // namespace tersekv::TERSEKV_ISA
