// Attention of a batch: cut into jobs, run on the pool, and put together again in an order that no thread changes.
#pragma once
#include <vector>

#include "kernels.h"

namespace tersekv {

// q and out are (b, h, g * n, d), lse is (b, h, g * n), all fp32 and contiguous.
struct Attention {
  const Side *k, *v;
  std::vector<Tokens> tokens;  // b * h
  const float* q;
  float *out, *lse;
  int rows, d, n;
  float scale;
  bool exact;
};

void attend(const Attention& attention, const Kernels& kernels, int threads);

// part 0 = parts 0..count-1 joined: `out` (rows, d) weighted by each part's share of the exponentials, `lse` (rows).
void merge(float* const* outs, float* const* lses, int count, int64_t rows, int d);

const float* log8_values();  // 0, and 2^((i - 144) / 12) for the codes 1..255

}  // namespace tersekv
