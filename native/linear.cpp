#include "linear.h"

#include <algorithm>
#include <cstring>

#include "pool.h"

namespace tersekv {

float* room(std::vector<float>& held, int64_t count) {
  if (int64_t(held.size()) < count) held.resize(size_t(count));
#ifdef TERSEKV_POISON
  std::memset(held.data(), 0xff, held.size() * sizeof(float));
#endif
  return held.data();
}

void load(const uint8_t* from, Kind kind, int vectors, int count, int64_t stride, float* to, const Processor& on) {
  for (int v = 0; v < vectors; v++) on.rows.load(from + v * stride, kind, count, to + int64_t(v) * count);
}

// Any number of them; rows are stored by fours.
void store(const float* from, Kind kind, int vectors, int count, int64_t stride, uint8_t* to, const Processor& on) {
  const int whole = count - count % 4;
  for (int v = 0; v < vectors; v++, from += count, to += stride) {
    on.rows.store(from, kind, whole, to);
    if (whole == count) continue;
    float four[4] = {};
    uint8_t bytes[16];
    std::copy(from + whole, from + count, four);
    on.rows.store(four, kind, 4, bytes);
    std::memcpy(to + width_of(kind) * whole, bytes, size_t(width_of(kind)) * size_t(count - whole));
  }
}

namespace {

void add_bias(const Product& product, int vectors, const Processor& on) {
  const Linear& layer = *product.layer;
  if (!layer.bias) return;
  float* const bias = product.y + int64_t(vectors) * layer.out;
  load(layer.bias, layer.kind, 1, layer.out, 0, bias, on);
  for (int v = 0; v < vectors; v++)
    for (int i = 0; i < layer.out; i++) product.y[int64_t(v) * layer.out + i] += bias[i];
}

}  // namespace

void multiply(std::initializer_list<Product> products, const float* x, int vectors, const Processor& on) {
  int64_t rows = 0, bytes = 0;
  for (const Product& p : products)
    rows += p.layer->out, bytes += int64_t(p.layer->out) * p.layer->in * width_of(p.layer->kind);
  // To hand work to a thread that looks for it costs about as much as reading this many bytes.
  constexpr int64_t LEAST = 64 << 10;
  const int jobs = int(std::clamp<int64_t>(bytes / LEAST, 1, std::max(on.threads, 1)));
  Pool::shared().run(jobs, on.threads, [&](int job) {
    int64_t before = 0;  // rows of the layers that were seen already
    for (const Product& p : products) {
      const int64_t first = std::max(rows * job / jobs - before, int64_t(0));
      const int64_t last = std::min(rows * (job + 1) / jobs - before, int64_t(p.layer->out));
      if (first < last) on.kernels.products(*p.layer, int(first), int(last), x, vectors, p.y);
      before += p.layer->out;
    }
  });
  for (const Product& p : products) add_bias(p, vectors, on);
}

void linear(const Linear& layer, const uint8_t* x, int vectors, uint8_t* y, const Processor& on) {
  thread_local std::vector<float> inputs, outputs;
  const int in = layer.in, out = layer.out;
  const int64_t width = width_of(layer.kind);
  float* const from = room(inputs, int64_t(vectors) * in);
  float* const to = room(outputs, int64_t(vectors + 1) * out);
  load(x, layer.kind, vectors, in, in * width, from, on);
  multiply({{&layer, to}}, from, vectors, on);
  store(to, layer.kind, vectors, out, out * width, y, on);
}

}  // namespace tersekv
