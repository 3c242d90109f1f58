// Attention of query rows over the tokens of one tier, in pieces that the pool can run. See parts.h for the whole.
#pragma once
#include <cstddef>
#include <vector>

#include "kernels.h"

namespace tersekv {

// q is (b, h, g * n, d), fp32 and contiguous, in the domain of the keys' codes.
struct Attention {
  const Side *k, *v;
  std::vector<Tokens> tokens;  // b * h
  const float* q;
  int rows, d, n;
  int heads;  // KV heads: h
  float scale;
  bool exact;
};

// Some query rows of a KV head and some of its tokens. `at`: of its partial result, in rows of `partial`.
struct Piece {
  int head, first_row, rows, part, parts;
  int64_t first, last;  // tokens
  size_t at;
};

// Sorted by head, rows and tokens; the same ones for any number of threads.
std::vector<Piece> cut(const Attention& attention);

// `partial`: (rows, d) outputs, then (rows) log-sum-exps. `next`: what the thread is likely to do afterwards, or null.
void run_piece(const Attention& attention, const Kernels& kernels, const Piece& piece, const Piece* next,
               float* partial);

// part 0 = parts 0..count-1 joined: `out` (rows, d) weighted by each part's share of the exponentials, `lse` (rows).
void merge(float* const* outs, float* const* lses, int count, int64_t rows, int d);

const float* log8_values();  // 0, and 2^((i - 144) / 12) for the codes 1..255

}  // namespace tersekv
