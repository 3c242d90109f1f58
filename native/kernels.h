// The kernels of one instruction set, and the scratch memory that one call of them needs.
#pragma once
#include "pages.h"

namespace tersekv {

constexpr int ROWS = 64;   // query rows of one job, at most: their sums stay in the second-level cache
constexpr int STRIP = 4;   // query rows that share one pass over a block, at most
constexpr int STRIPS = 4;  // strips that share one product of matrices, at most
constexpr int TILE = 4;    // blocks that share one step of the running softmax, at most
constexpr int LANES = 16;  // floats of the widest register
constexpr int FIRST_LEVEL = 48 << 10;  // bytes of the first-level cache, as tiles use it
constexpr int BLOCKS_AHEAD = TILE + 1;  // after which a page is read that is asked for now, if not soon before

// Query rows of a job, prepared for the keys of a block.
struct alignas(64) Queries {
  float scaled[ROWS * MAX_HEAD_DIM];      // folded, times the softmax scale, in units of log2
  float by_channel[ROWS * MAX_HEAD_DIM];  // the same times the channel scales of a block's keys
  int8_t int8[ROWS * MAX_HEAD_DIM];
  float total[ROWS];                      // sum over channels
  float gain[ROWS], shift[ROWS];          // a dot product in levels times gain plus shift is one in table entries
  const float* folded;                    // `scaled` or `by_channel`
};

// What sides need whose numbers are in groups. See groups.h.
constexpr int TOKEN_GROUPS = BLOCK / 16, CHANNEL_GROUPS = MAX_HEAD_DIM / 16;
struct alignas(64) Groups {
  float folded[TOKEN_GROUPS * ROWS * MAX_HEAD_DIM];  // the queries of each group, as `Queries` has them of all
  int8_t int8[TOKEN_GROUPS * ROWS * MAX_HEAD_DIM];
  float gain[CHANNEL_GROUPS][ROWS], shift[CHANNEL_GROUPS][ROWS], total[CHANNEL_GROUPS][ROWS];
  float k_scale[CHANNEL_GROUPS * BLOCK], k_zero[CHANNEL_GROUPS * BLOCK];  // of each group and token
  float v_scale[CHANNEL_GROUPS * BLOCK], v_zero[CHANNEL_GROUPS * BLOCK];
  float k_channel_scale[TOKEN_GROUPS * MAX_HEAD_DIM], k_channel_zero[TOKEN_GROUPS * MAX_HEAD_DIM];
  float v_channel_scale[TOKEN_GROUPS * MAX_HEAD_DIM], v_channel_zero[TOKEN_GROUPS * MAX_HEAD_DIM];
  float row_major[CHANNEL_GROUPS * BLOCK];
  float weights[STRIP * BLOCK];  // of a strip for one group of values
  int8_t int8_weights[STRIP * BLOCK];
  float weight_gain[STRIP], low[STRIP], mass[STRIP];
};

// What the `vq` recipe keeps of all entries for up to two strips, and a block's decoded values for more. See lookups.h.
struct alignas(64) Entries {
  float products[2 * MAX_STAGES * MAX_PLACES * MAX_ENTRIES * STRIP];
  float weights[2 * MAX_STAGES * MAX_PLACES * MAX_ENTRIES * STRIP];
  float k[BLOCK * MAX_HEAD_DIM], v[BLOCK * MAX_HEAD_DIM];
};

// The running softmax of a job's rows, in lanes that are added up at the end.
struct alignas(64) Sums {
  float mass[ROWS * LANES];    // of exponentials
  float common[ROWS * LANES];  // what every channel of the output gets alike
};

// What is read from a block once for all rows.
struct alignas(64) Block {
  float k_scale[BLOCK], k_zero[BLOCK], v_scale[BLOCK], v_zero[BLOCK];
  float channel[MAX_HEAD_DIM], v_channel_scale[MAX_HEAD_DIM], v_channel_zero[MAX_HEAD_DIM];
  float bias[ROWS];  // product of each query with the keys' channel zeros
  float q_gain[ROWS], q_shift[ROWS];
  uint8_t k_levels[BLOCK * MAX_HEAD_DIM], v_levels[BLOCK * MAX_HEAD_DIM];
  const uint8_t *k, *v;
  const uint8_t* ahead[2];  // sides of pages that are read later, in the order in which they are asked for, or null
  int first, last;  // the tokens of the block that count
};

// Scores and weights of one strip over the blocks of a tile.
struct alignas(64) Strip {
  float scores[TILE][STRIP * BLOCK], weights[TILE][STRIP * BLOCK];
  int8_t int8[TILE][STRIP * BLOCK];
  int32_t seen[TILE][STRIP * BLOCK];  // -1, or 0 where a row does not see a token
  float gain[TILE][STRIP], shift[TILE][STRIP], mass[TILE][STRIP];
  float fade[STRIP], one[STRIP];
  float mixed[STRIP * MAX_HEAD_DIM];
};

// Products of matrices on their way from and to strips.
struct alignas(64) Products {
  int32_t sums[STRIPS * STRIP * MAX_HEAD_DIM];
  int8_t weights[STRIPS * STRIP * BLOCK];
};

struct Scratch {
  Queries q;
  Sums sums;
  Block block[TILE];
  Strip strip[STRIPS];
  Products products;
  Groups groups;
  Entries entries;
  const float* log8;  // what the 256 codes of a logarithmic scale stand for
};

// A model's linear layer. Rows of the weights (out, in) are contiguous, `in` a multiple of LANES; `bias` may be null.
struct Linear {
  const uint8_t *weights, *bias;
  Kind kind;
  int in, out;
};

struct Kernels {
  const char* name;
  void (*attend)(const Job&, Scratch&, Partial);
  // Products of vectors x (vectors, in) with rows first..last of the weights, in y (vectors, out).
  void (*products)(const Linear&, int first, int last, const float* x, int vectors, float* y);
  // See activations.h.
  void (*norm)(const float* x, const float* weights, int n, float eps, float* y);
  void (*gated)(float* gate, const float* up, int n);
};

}  // namespace tersekv
