// The codebooks of the `vq` recipe. Plain data.
#pragma once
#include <vector>

namespace tersekv {

// An index has up to 8 bits, a sub-vector 4 channels and more.
constexpr int MAX_STAGES = 2, MAX_ENTRIES = 256, MAX_PLACES = 128;

// `entries` sub-vectors of `dim` numbers for each KV head and place in a token, or for all of them: `heads` or `places`
// is 1. A value is the sum over stages.
struct Books {
  int dim = 0, index = 0, heads = 0, places = 0;  // `index`: bits of one
  std::vector<std::vector<float>> stages;         // each (heads, places, entries, dim)

  int entries() const { return 1 << index; }
  const float* entry(int stage, int head, int place) const {
    const size_t row = size_t(heads > 1 ? head : 0) * size_t(places) + size_t(places > 1 ? place : 0);
    return stages[size_t(stage)].data() + row * size_t(entries()) * size_t(dim);
  }
};

}  // namespace tersekv
