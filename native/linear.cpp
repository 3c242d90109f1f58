#include "linear.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "pool.h"

namespace tersekv {

namespace {

// Room that a thread keeps: a layer follows a layer.
float* room(std::vector<float>& held, int64_t count) {
  if (int64_t(held.size()) < count) held.resize(size_t(count));
#ifdef TERSEKV_POISON
  std::memset(held.data(), 0xff, held.size() * sizeof(float));
#endif
  return held.data();
}

// Any number of them; rows are stored by fours.
void store(const EncodeKernels& rows, const float* from, Kind kind, int count, uint8_t* to) {
  const int whole = count - count % 4, width = kind == Kind::fp32 ? 4 : 2;
  rows.store(from, kind, whole, to);
  if (whole == count) return;
  float four[4] = {};
  uint8_t bytes[16];
  std::copy(from + whole, from + count, four);
  rows.store(four, kind, 4, bytes);
  std::memcpy(to + int64_t(width) * whole, bytes, size_t(width) * size_t(count - whole));
}

}  // namespace

void linear(const Linear& layer, const uint8_t* x, int vectors, uint8_t* y, const Kernels& kernels,
            const EncodeKernels& rows, int threads) {
  thread_local std::vector<float> inputs, outputs;
  const int in = layer.in, out = layer.out;
  const int64_t width = layer.kind == Kind::fp32 ? 4 : 2;
  float* const from = room(inputs, int64_t(vectors) * in);
  float* const to = room(outputs, int64_t(vectors + 1) * out);  // the last row is for the bias
  for (int v = 0; v < vectors; v++) rows.load(x + v * in * width, layer.kind, in, from + int64_t(v) * in);
  // Waking a thread costs about as much as reading this many bytes.
  constexpr int64_t LEAST = 64 << 10;
  const int jobs = int(std::clamp<int64_t>(int64_t(out) * in * width / LEAST, 1, std::max(threads, 1)));
  Pool::shared().run(jobs, threads, [&](int job) {
    const int first = int(int64_t(out) * job / jobs), last = int(int64_t(out) * (job + 1) / jobs);
    kernels.products(layer, first, last, from, vectors, to);
  });
  float* const bias = to + int64_t(vectors) * out;
  if (layer.bias) rows.load(layer.bias, layer.kind, out, bias);
  for (int v = 0; v < vectors; v++) {
    float* const row = to + int64_t(v) * out;
    for (int i = 0; layer.bias && i < out; i++) row[i] += bias[i];
    store(rows, row, layer.kind, out, y + v * out * width);
  }
}

}  // namespace tersekv
