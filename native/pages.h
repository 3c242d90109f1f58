// What kernels see of packed pages and dense tokens. Plain data: no ISA, no Python.
#pragma once
#include <cstdint>
#include <memory>

#include "books.h"

namespace tersekv {

constexpr int BLOCK = 64;        // tokens that are encoded together
constexpr int MAX_HEAD_DIM = 512;

enum class Kind : int { none, fp32, fp16, bf16, log8, int8 };

// One plane of numbers inside a block: bytes from the block's start. `step` multiplies "int8" numbers.
struct Plane {
  Kind kind = Kind::none;
  int offset = 0;
  int step = -1;
  explicit operator bool() const { return kind != Kind::none; }
};

// How the keys or the values of a block become numbers: the `grid` or `trellis` recipe, or, if `bits` is 0, `vq` where
// there are books and `dense` where not.
struct Side {
  int bits = 0;                  // of a code; 0: plane `values` holds the numbers themselves
  int d = 0;                     // head dim
  int start = 0, bytes = 0;      // of this side in the page
  int codes = 0, codes2 = 0;     // offset of the plane of codes, in its side's simd or trellis order; of a second stage
  std::shared_ptr<const Books> books;  // of `vq`, whose codes are indices in the linear order
  Plane values;                  // dense only
  Plane scale, zero;             // one number for each token
  Plane channel_scale, channel_zero;  // one number for each channel
  int tokens_each = BLOCK;       // that share the numbers of a channel; if fewer, its planes have a row for each group
  int channels_each = 0;         // that share the numbers of a token; if fewer than `d`, a column for each group
  bool channels_first = false;   // (table * channel scale + channel zero) * scale, not the token's numbers first
  bool trellis = false;          // the table is looked up by the last 8 bits of a token's codes, not by one of them
  float table[256] = {};         // what a code stands for
  float step = 0, low = 0;       // table[i] is near low + step * levels[i]
  // What roundings are measured from: half of an asymmetric grid's range.
  float middle() const { return low + 63.5f * step; }
  // Of a trellis the first 128 entries, exactly; the others are 127 less those. Otherwise the table on 0..127, by
  // indices of 6 bits in which a code may lie at several places: see `code_at`.
  uint8_t levels[4][64] = {};

  bool in_token_groups() const { return tokens_each < BLOCK; }
  bool in_channel_groups() const { return channels_each < d; }
  bool in_groups() const { return in_token_groups() || in_channel_groups(); }
};

// Which code the index of a look-up names, in table `which`: bits 0.., 4 / bits places further up in each next table.
// Codes of 3 bits lie at bits 0 and 3; the last two tables take theirs from bits 0, 1, 4 and bits 2, 3, 5.
inline int code_at(int bits, int which, int index) {
  if (bits == 3 && which >= 2) return (index >> 2 * (which - 2) & 3) | (index >> (which + 2) & 1) << 2;
  return index >> bits * which & ((1 << bits) - 1);
}

// Where the tokens of one (sequence, KV head) lie. Either pages behind a table, or rows of a dense tensor.
struct Tokens {
  const uint8_t* pool = nullptr;
  int64_t page_bytes = 0;
  const int32_t* table = nullptr;             // page of each block
  const uint8_t *k = nullptr, *v = nullptr;   // dense: first token's channels
  int64_t k_stride = 0, v_stride = 0;         // dense: bytes between tokens
  int64_t first = 0, length = 0;              // tokens first..length count
  int64_t last = 0;                           // of them, those below this one are this job's
  bool causal = false;                        // dense: query i of n sees tokens up to length - n + i
  const int32_t* next = nullptr;              // pages that the same thread is likely to read afterwards
  int64_t next_count = 0;
};

// Running softmax of some query rows: `out` is not yet divided by `sum`.
struct Partial {
  float* out;   // rows x d
  float* max;   // STRIP more than rows
  float* sum;
};

// How memory that is read later is asked for: into the first-level cache or the second, and early, or soon before.
struct Hints {
  bool first_level, soon;
};

struct Job {
  const Side *k, *v;
  Tokens tokens;
  const float* q;   // rows x d, folded
  int rows, d, n;   // row r is query r % n of its head
  int first_row;    // of this job among the rows of its KV head
  float scale;
  bool exact;       // fp32 look-ups and products instead of int8
  int head;         // among the KV heads
  Hints hints;
};

}  // namespace tersekv
