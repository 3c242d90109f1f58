// The `dense` recipe: tokens in fp32, fp16 or bf16, one after another.
#pragma once
#include "planes.h"

namespace tersekv::TERSEKV_ISA {

// dots[r][j] of `count` tokens; d is a multiple of 8, and registers of 16 lanes finish with a copy of the rest.
template <Kind KIND, int R>
void score_dense(const uint8_t* tokens, int64_t stride, int count, int d, const float* q, float* dots) {
  constexpr int WIDTH = KIND == Kind::fp32 ? 4 : 2;
  const int whole = d - d % Isa::LANES;
  alignas(64) uint8_t rest[4 * 16] = {};
  alignas(64) float rest_q[R][16] = {};
  for (int r = 0; r < R; r++)
    for (int c = whole; c < d; c++) rest_q[r][c - whole] = q[r * d + c];
  for (int j = 0; j < count; j++) {
    const uint8_t* row = tokens + j * stride;
    Isa::Floats sum[R] = {};
    for (int c = 0; c < whole; c += Isa::LANES) {
      const Isa::Floats x = load_floats<KIND>(row, c);
      for (int r = 0; r < R; r++) sum[r] += x * Isa::load<Isa::Floats>(q + r * d + c);
    }
    if (whole < d) {
      std::memcpy(rest, row + WIDTH * whole, WIDTH * (d - whole));
      const Isa::Floats x = load_floats<KIND>(rest, 0);
      for (int r = 0; r < R; r++) sum[r] += x * Isa::load<Isa::Floats>(rest_q[r]);
    }
    for (int r = 0; r < R; r++) dots[BLOCK * r + j] = Isa::sum(sum[r]);
  }
}

template <Kind KIND, int R>
void mix_dense(const uint8_t* tokens, int64_t stride, int count, int d, const float* w, const float* gain,
               float* out) {
  constexpr int WIDTH = KIND == Kind::fp32 ? 4 : 2;
  for (int c = 0; c < d; c += Isa::LANES) {
    Isa::Floats sum[R] = {};
    const int lanes = d - c < Isa::LANES ? d - c : Isa::LANES;
    alignas(64) uint8_t rest[4 * 16] = {};
    for (int j = 0; j < count; j++) {
      const uint8_t* row = tokens + j * stride;
      Isa::Floats x;
      if (lanes == Isa::LANES) {
        x = load_floats<KIND>(row, c);
      } else {
        std::memcpy(rest, row + WIDTH * c, WIDTH * lanes);
        x = load_floats<KIND>(rest, 0);
      }
      for (int r = 0; r < R; r++) sum[r] += x * Isa::all(w[BLOCK * r + j]);
    }
    for (int r = 0; r < R; r++) {
      float* to = out + r * d + c;
      if (lanes == Isa::LANES) {
        Isa::add_to(to, gain[r], sum[r]);
      } else {
        for (int i = 0; i < lanes; i++) to[i] += sum[r][i] * gain[r];
      }
    }
  }
}

}  // namespace tersekv::TERSEKV_ISA
