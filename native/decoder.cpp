#include "decoder.h"

#include <algorithm>

namespace tersekv {

namespace {

// A pass's scratch memory, part by part.
struct Rooms {
  float* next;
  float* take(int64_t count) {
    float* const here = next;
    next += (count + LANES - 1) / LANES * LANES;
    return here;
  }
};

void norm(const uint8_t* weights, const float* x, int vectors, int n, const DecoderLayer& layer, Rooms rooms, float* y,
          const Processor& on) {
  float* const w = rooms.take(n);
  load(weights, layer.kind, 1, n, 0, w, on);
  for (int v = 0; v < vectors; v++) on.kernels.norm(x + int64_t(v) * n, w, n, layer.eps, y + int64_t(v) * n);
}

// Heads of one token.
void turn(float* x, int heads, int d, const float* cos, const float* sin) {
  const int half = d / 2;
  for (int h = 0; h < heads; h++, x += d)
    for (int i = 0; i < half; i++) {
      const float a = x[i], b = x[i + half];
      x[i] = a * cos[i] - b * sin[i], x[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

int64_t most(const DecoderLayer& layer) { return std::max({layer.hidden(), layer.heads() * layer.d, layer.up.out}); }

}  // namespace

void project(const DecoderLayer& layer, const uint8_t* x, const uint8_t* cos, const uint8_t* sin, int vectors,
             uint8_t* y, const Processor& on) {
  thread_local std::vector<float> held;
  const int hidden = layer.hidden(), d = layer.d;
  const int64_t width = width_of(layer.kind), row = width * layer.heads() * d;
  Rooms rooms{room(held, (vectors + 1) * (3 * most(layer) + 2 * d + 6 * LANES))};
  float* const in = rooms.take(int64_t(vectors) * hidden);
  load(x, layer.kind, vectors, hidden, hidden * width, in, on);
  norm(layer.input, in, vectors, hidden, layer, rooms, in, on);
  float *q = rooms.take(int64_t(vectors + 1) * layer.q.out), *k = rooms.take(int64_t(vectors + 1) * layer.k.out),
        *v = rooms.take(int64_t(vectors + 1) * layer.v.out), *c = rooms.take(int64_t(vectors) * d),
        *s = rooms.take(int64_t(vectors) * d);
  multiply({{&layer.q, q}, {&layer.k, k}, {&layer.v, v}}, in, vectors, on);
  const int q_heads = layer.q.out / d, k_heads = layer.k.out / d;
  if (layer.q_norm) norm(layer.q_norm, q, vectors * q_heads, d, layer, rooms, q, on);
  if (layer.k_norm) norm(layer.k_norm, k, vectors * k_heads, d, layer, rooms, k, on);
  load(cos, layer.kind, vectors, d, d * width, c, on);
  load(sin, layer.kind, vectors, d, d * width, s, on);
  for (int i = 0; i < vectors; i++) {
    turn(q + int64_t(i) * layer.q.out, q_heads, d, c + i * d, s + i * d);
    turn(k + int64_t(i) * layer.k.out, k_heads, d, c + i * d, s + i * d);
  }
  store(q, layer.kind, vectors, layer.q.out, row, y, on);
  store(k, layer.kind, vectors, layer.k.out, row, y + width * layer.q.out, on);
  store(v, layer.kind, vectors, layer.v.out, row, y + width * (layer.q.out + layer.k.out), on);
}

void finish(const DecoderLayer& layer, const uint8_t* attended, const uint8_t* x, int vectors, uint8_t* y,
            const Processor& on) {
  thread_local std::vector<float> held;
  const int hidden = layer.hidden(), inner = layer.up.out, from = layer.o.in;
  const int64_t width = width_of(layer.kind), all = int64_t(vectors) * hidden;
  Rooms rooms{room(held, (vectors + 1) * (6 * most(layer) + 6 * LANES))};
  float *in = rooms.take(int64_t(vectors) * from), *sum = rooms.take(all), *out = rooms.take(all + hidden),
        *normed = rooms.take(all), *gate = rooms.take(int64_t(vectors + 1) * inner),
        *up = rooms.take(int64_t(vectors + 1) * inner);
  load(attended, layer.kind, vectors, from, from * width, in, on);
  load(x, layer.kind, vectors, hidden, hidden * width, sum, on);
  multiply({{&layer.o, out}}, in, vectors, on);
  for (int64_t i = 0; i < all; i++) sum[i] += out[i];
  norm(layer.post, sum, vectors, hidden, layer, rooms, normed, on);
  multiply({{&layer.gate, gate}, {&layer.up, up}}, normed, vectors, on);
  on.kernels.gated(gate, up, vectors * inner);
  multiply({{&layer.down, out}}, gate, vectors, on);
  for (int64_t i = 0; i < all; i++) sum[i] += out[i];
  store(sum, layer.kind, vectors, hidden, hidden * width, y, on);
}

}  // namespace tersekv
