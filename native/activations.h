// What a model's layer does to vectors between its products of matrices. `n` is a multiple of the widest register.
#pragma once
#include "kernels.h"
#include "vector.h"

namespace tersekv::TERSEKV_ISA {

// y = x over the root of its mean square, times weights. y may be x.
inline void norm(const float* x, const float* weights, int n, float eps, float* y) {
  Isa::Floats sum = {};
  for (int i = 0; i < n; i += Isa::LANES) {
    const auto v = Isa::load<Isa::Floats>(x + i);
    sum += v * v;
  }
  const float gain = 1 / __builtin_sqrtf(Isa::sum(sum) / float(n) + eps);
  for (int i = 0; i < n; i += Isa::LANES)
    Isa::store(y + i, Isa::load<Isa::Floats>(x + i) * gain * Isa::load<Isa::Floats>(weights + i));
}

// gate = gate / (1 + e^-gate) * up
inline void gated(float* gate, const float* up, int n) {
  constexpr float LOG2E = 1.4426950408889634f;
  for (int i = 0; i < n; i += Isa::LANES) {
    const auto g = Isa::load<Isa::Floats>(gate + i);
    const auto power = Isa::power_of_two<Isa::Floats, Isa::Ints>(g * -LOG2E);
    Isa::store(gate + i, g / (power + 1.f) * Isa::load<Isa::Floats>(up + i));
  }
}

}  // namespace tersekv::TERSEKV_ISA
