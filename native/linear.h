// A model's linear layers for a few tokens, whose products take as long as it takes to read the weights.
#pragma once
#include "encode.h"
#include "kernels.h"

namespace tersekv {

// y = x W^T + bias, all of one kind, their rows contiguous: W is (out, in), x (vectors, in), y (vectors, out).
void linear(const Linear& layer, const uint8_t* x, int vectors, uint8_t* y, const Kernels& kernels,
            const EncodeKernels& rows, int threads);

}  // namespace tersekv
