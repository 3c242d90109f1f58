// A model's linear layers for a few tokens, whose products take as long as it takes to read the weights.
#pragma once
#include <initializer_list>
#include <vector>

#include "encode.h"
#include "kernels.h"

namespace tersekv {

struct Processor {
  const Kernels& kernels;
  const EncodeKernels& rows;
  int threads;
};

inline int64_t width_of(Kind kind) { return kind == Kind::fp32 ? 4 : 2; }

// Room that a thread keeps: a layer follows a layer.
float* room(std::vector<float>& held, int64_t count);

// `vectors` rows of `count` numbers, `stride` bytes apart, as floats one after the other, and back.
void load(const uint8_t* from, Kind kind, int vectors, int count, int64_t stride, float* to, const Processor& on);
void store(const float* from, Kind kind, int vectors, int count, int64_t stride, uint8_t* to, const Processor& on);

struct Product {
  const Linear* layer;
  float* y;  // (vectors + 1, out); the last row is for the bias
};
// y = x W^T + bias of layers that all take x (vectors, in). Threads share the rows of all of them.
void multiply(std::initializer_list<Product> products, const float* x, int vectors, const Processor& on);

// The same of one layer, all of one kind, rows contiguous: W is (out, in), x (vectors, in), y (vectors, out).
void linear(const Linear& layer, const uint8_t* x, int vectors, uint8_t* y, const Processor& on);

}  // namespace tersekv
