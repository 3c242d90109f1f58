// How the values of a block become the planes of a page. Plain data: no ISA, no Python.
#pragma once
#include <string>
#include <vector>

#include "pages.h"

namespace tersekv {

enum class Order : int { linear, simd_k, simd_v, trellis_k, trellis_v };
inline bool in_words(Order order) { return order >= Order::trellis_k; }
enum class Method : int { table, uniform, dense, trellis };

// Finds codes 1..255 of a positive number on the logarithmic scale: one bin of 1/32 octave holds at most one edge.
struct Log8 {
  static constexpr int FIRST = (127 - 13) * 32, BINS = 23 * 32 + 1;  // from 2^-13 to 2^10
  float edges[256];   // between the codes 1..255, then infinity
  float floor;        // below it the code is 0
  uint8_t below[BINS];  // edges below the bin
};

struct Encoder {
  Method method = Method::dense;
  Order order = Order::linear;
  int d = 0, bits = 0, nbytes = 0, codes = 0;
  Plane values, scale, zero, channel_scale, channel_zero;

  // table: an odd-symmetric one. Bins of the magnitude for tables too long to compare with every threshold.
  float thresholds[256], centroids[256];  // between positive entries, then infinity; all entries
  int32_t below[256];                     // thresholds below a bin
  float bins_per_unit = 0;
  int in_bin = 0;                         // thresholds in one bin, at most
  bool unbiased = false;
  float root_d = 0, factor = 1;           // a stored norm is multiplied by `factor`
  bool rotated = false;
  float signs[MAX_HEAD_DIM];
  Log8 log8;

  // trellis: `centroids` of its states, in odd multiples of a step of which a value of 1 has half `per_unit`
  int16_t odd[256];
  float per_unit = 0;

  // uniform: steps low..high
  bool symmetric = false;
  int low = 0, high = 0;
  float inverse_top = 0;
};

// One block of tokens: channels are contiguous, tokens `stride` bytes apart.
struct Input {
  const uint8_t* data;
  int64_t stride;
  Kind kind;
};

struct alignas(64) TrellisScratch {
  int32_t w[BLOCK * MAX_HEAD_DIM];
  int32_t cost[2][256 * 16];
  uint8_t fallen[MAX_HEAD_DIM * 128 * 16], states[MAX_HEAD_DIM * 16];
};

struct alignas(64) EncodeScratch {
  float y[BLOCK * MAX_HEAD_DIM];
  float zero[MAX_HEAD_DIM], inverse[MAX_HEAD_DIM];
  float scale[BLOCK];
  uint8_t codes[BLOCK * MAX_HEAD_DIM];
  uint8_t rows[BLOCK * MAX_HEAD_DIM];
  TrellisScratch trellis;
};

struct EncodeKernels {
  void (*encode)(const Encoder&, const Input&, EncodeScratch&, uint8_t* out);
  void (*repack)(int bits, int d, Order from, Order to, const uint8_t* codes, EncodeScratch&, uint8_t* out);
  // Codes of a block of fp32, a byte each, by the table of the encoder; `passed`: row i is what an error of channel i
  // changes in those behind it.
  void (*steer)(const Encoder&, const Input&, const float* passed, EncodeScratch&, uint8_t* codes);
  // One row: y = H (x * before) * after, H orthonormal; either factor may be null.
  void (*rotate)(const float* x, int d, const float* before, const float* after, float* y);
  // Rows in fp32, fp16 or bf16 as floats, and back.
  void (*load)(const uint8_t* from, Kind kind, int count, float* to);
  void (*store)(const float* from, Kind kind, int count, uint8_t* to);
};

const EncodeKernels& encode_kernels(const std::string& isa);

void encode(const Encoder& encoder, const std::vector<Input>& blocks, const std::vector<uint8_t*>& out,
            const EncodeKernels& kernels, int threads);

struct Repacking {
  int bits, d, nbytes, codes;  // of a block, and where its codes lie
  Order from, to;
};

void repack(const Repacking& how, const std::vector<const uint8_t*>& blocks, const std::vector<uint8_t*>& out,
            const EncodeKernels& kernels, int threads);

void steer(const Encoder& encoder, const std::vector<Input>& blocks, const std::vector<const float*>& passed,
           const std::vector<uint8_t*>& out, const EncodeKernels& kernels, int threads);

void rotate(const float* x, int64_t rows, int d, const float* before, const float* after, float* y,
            const EncodeKernels& kernels, int threads);

// Derived tables.
void set_bins(Encoder& encoder);
void set_log8(Log8& log8, const std::vector<float>& edges, float floor);

}  // namespace tersekv
