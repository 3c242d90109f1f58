// Attention over all tiers of a layer in one call: queries enter the domain of each tier's codes, outputs leave it and
// are joined by their log-sum-exps.
#pragma once
#include <vector>

#include "attend.h"
#include "encode.h"

namespace tersekv {

// The tokens of one tier.
struct Part {
  Side k, v;
  std::vector<Tokens> rows;                             // b * h
  // What channels of a query are multiplied by before a Hadamard rotation into the domain of keys' codes, and those of
  // an output after one that leads out of that of values: signs, of queries also factors, then (b * h, d) of them.
  const float *before = nullptr, *after = nullptr;
  bool before_each_row = false;
  int b = 0, h = 0, d = 0;
};

// Rows (b, hq, n) of contiguous channels, whose starts lie that many bytes apart.
struct Strided {
  uint8_t* data;
  Kind kind;
  int64_t batch, head, token;
  uint8_t* row(int i, int j, int t) const { return data + i * batch + j * head + t * token; }
};

// Softmax attention of n new tokens over the parts; g query heads share a KV head.
struct Request {
  std::vector<const Part*> parts;
  Strided q, out;
  float* lse;  // (b, hq, n), contiguous; or null
  int b, h, g, n, d;
  float scale;
  bool exact;
};

void attend(const Request& request, const Kernels& kernels, const EncodeKernels& rows, int threads);

}  // namespace tersekv
