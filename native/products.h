// Products of a few vectors with rows of a matrix, which are read once, from memory.
#pragma once
#include "planes.h"

namespace tersekv::TERSEKV_ISA {

constexpr int LINE = 64;          // bytes of a cache line
constexpr int STREAMS = 4;        // rows that are read at once, a quarter of the job apart: memory gives the most so
constexpr int64_t ASKED = 2048;   // bytes ahead of which a row asks for what lies behind it, other rows included
constexpr int VECTORS = 4;        // that share one pass

// Of S rows, `apart` bytes from each other, with V vectors, written to y[v * out + s * rows_apart].
template <Kind KIND, int S, int V>
INLINE void row_products(const uint8_t* row, int64_t apart, int in, const float* x, float* y, int64_t rows_apart,
                         int64_t out) {
  constexpr int WIDTH = KIND == Kind::fp32 ? 4 : 2, EACH = LINE / WIDTH, SUMS = V == 1 ? 2 : 1;
  Isa::Floats sum[S][V][SUMS] = {};
  int c = 0;
  for (; c + EACH <= in; c += EACH)
#pragma GCC unroll 4
    for (int s = 0; s < S; s++) {
      const uint8_t* line = row + s * apart + WIDTH * c;
      __builtin_prefetch(line + ASKED);
#pragma GCC unroll 16
      for (int i = 0; i < EACH; i += Isa::LANES) {
        const Isa::Floats w = load_floats<KIND>(line, i);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++)
          sum[s][v][i / Isa::LANES % SUMS] += w * Isa::load<Isa::Floats>(x + int64_t(v) * in + c + i);
      }
    }
  for (; c < in; c += Isa::LANES)
    for (int s = 0; s < S; s++)
      for (int v = 0; v < V; v++)
        sum[s][v][0] += load_floats<KIND>(row + s * apart, c) * Isa::load<Isa::Floats>(x + int64_t(v) * in + c);
  for (int s = 0; s < S; s++)
    for (int v = 0; v < V; v++) {
      if (SUMS == 2) sum[s][v][0] += sum[s][v][SUMS - 1];
      y[v * out + s * rows_apart] = Isa::sum(sum[s][v][0]);
    }
}

template <Kind KIND, int S>
INLINE void row_products(const Linear& l, int first, int64_t quarter, const float* x, int vectors, float* y) {
  const int64_t bytes = int64_t(l.in) * (KIND == Kind::fp32 ? 4 : 2);
  const uint8_t* row = l.weights + first * bytes;
  for (int v = 0; v < vectors; v += VECTORS) {  // from the second pass on, the rows are in the cache
    const float* from = x + int64_t(v) * l.in;
    float* to = y + int64_t(v) * l.out + first;
    switch (vectors - v) {
      case 1: row_products<KIND, S, 1>(row, quarter * bytes, l.in, from, to, quarter, l.out); break;
      case 2: row_products<KIND, S, 2>(row, quarter * bytes, l.in, from, to, quarter, l.out); break;
      case 3: row_products<KIND, S, 3>(row, quarter * bytes, l.in, from, to, quarter, l.out); break;
      default: row_products<KIND, S, 4>(row, quarter * bytes, l.in, from, to, quarter, l.out);
    }
  }
}

template <Kind KIND>
void all_products(const Linear& l, int first, int last, const float* x, int vectors, float* y) {
  const int quarter = (last - first) / STREAMS;
  for (int i = first; i < first + quarter; i++) row_products<KIND, STREAMS>(l, i, quarter, x, vectors, y);
  for (int i = first + STREAMS * quarter; i < last; i++) row_products<KIND, 1>(l, i, 0, x, vectors, y);
}

// Rows first..last of the matrix; y is (vectors, out).
inline void products(const Linear& l, int first, int last, const float* x, int vectors, float* y) {
  if (l.kind == Kind::fp32) return all_products<Kind::fp32>(l, first, last, x, vectors, y);
  if (l.kind == Kind::fp16) return all_products<Kind::fp16>(l, first, last, x, vectors, y);
  all_products<Kind::bf16>(l, first, last, x, vectors, y);
}

}  // namespace tersekv::TERSEKV_ISA
