// A query row as the codes of keys want it.
#pragma once
#include "softmax.h"

namespace tersekv::TERSEKV_ISA {

// Sum over channels; a dot product in levels times `gain` plus `shift` is one in table entries.
struct Prepared {
  float total, gain, shift;
};

// `int8`: where the row is rounded to steps of its largest magnitude / 127, or null if it is read as it is.
inline Prepared prepared(const float* row, int d, const Side& keys, int8_t* int8) {
  Floats total = {}, largest[4] = {};
  int c = 0;
  for (; c + Isa::LANES <= d; c += Isa::LANES) {
    const Floats x = Isa::load<Floats>(row + c);
    total += x, largest[0] = Isa::max(largest[0], Isa::abs(x));
  }
  Prepared out{Isa::sum(total), 1, 0};
  for (; c < d; c++) out.total += row[c];  // a dense head dim, whose sides have no codes
  if (!int8) return out;
  const float top = Isa::highest(largest)[0], step = top / 127;
  const Floats inverse = Isa::all(top > TINY ? 127 / top : 0);
  Floats steps = {};
  for (c = 0; c < d; c += Isa::LANES) {
    const Floats x = Isa::rounded(Isa::load<Floats>(row + c) * inverse);
    steps += x - 12582912.f;
    Isa::store_int8(int8 + c, x);
  }
  const float rounded = step * Isa::sum(steps);
  out.gain = step * keys.step, out.shift = rounded * keys.low + (out.total - rounded) * keys.middle();
  return out;
}

}  // namespace tersekv::TERSEKV_ISA
