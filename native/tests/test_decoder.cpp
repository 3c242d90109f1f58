// Decoder layers of every instruction set that runs here, in memory that no kernel may leave, against double precision.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>

#include "decoder.h"
#include "guarded.h"
#include "isas.h"

namespace tersekv {

namespace {

using Numbers = std::vector<double>;

// Random numbers as they are stored, and what they are then.
struct Stored {
  Numbers numbers;
  Guarded<uint8_t> bytes;
  Stored(Numbers drawn, Kind kind) : numbers(std::move(drawn)), bytes(numbers.size() * size_t(width_of(kind))) {
    const EncodeKernels& rows = encode_kernels("portable");
    std::vector<float> floats(numbers.begin(), numbers.end());
    rows.store(floats.data(), kind, int(floats.size()), bytes.data());
    rows.load(bytes.data(), kind, int(floats.size()), floats.data());
    numbers.assign(floats.begin(), floats.end());
  }
};

Numbers drawn(int count, double size, std::mt19937& random, double around = 0) {
  std::normal_distribution<double> normal(around, size);
  Numbers x(static_cast<size_t>(count));
  for (double& one : x) one = normal(random);
  return x;
}

Numbers product(const Stored& w, const Numbers& x, int in, int vectors) {
  Numbers y;
  for (int v = 0; v < vectors; v++)
    for (size_t row = 0; row < w.numbers.size(); row += size_t(in)) {
      double sum = 0;
      for (int i = 0; i < in; i++) sum += w.numbers[row + size_t(i)] * x[size_t(v * in + i)];
      y.push_back(sum);
    }
  return y;
}

Numbers normed(const Numbers& x, const Numbers& gain, double eps) {
  Numbers y = x;
  const size_t n = gain.size();
  for (size_t at = 0; at < x.size(); at += n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += x[at + i] * x[at + i];
    for (size_t i = 0; i < n; i++) y[at + i] = x[at + i] / std::sqrt(sum / double(n) + eps) * gain[i];
  }
  return y;
}

struct Sizes {
  int q_heads, k_heads, d, hidden, inner, vectors;
  bool head_norms;
};

struct Case {
  Sizes s;
  Kind kind;
  Stored q, k, v, o, gate, up, down, input, post, head, x, cos, sin, attended;
  static constexpr double EPS = 1e-5;

  Case(const Sizes& s, Kind kind, std::mt19937& r)
      : s(s), kind(kind), q(matrix(s.q_heads * s.d, s.hidden, r), kind), k(matrix(s.k_heads * s.d, s.hidden, r), kind),
        v(matrix(s.k_heads * s.d, s.hidden, r), kind), o(matrix(s.hidden, s.q_heads * s.d, r), kind),
        gate(matrix(s.inner, s.hidden, r), kind), up(matrix(s.inner, s.hidden, r), kind),
        down(matrix(s.hidden, s.inner, r), kind), input(drawn(s.hidden, 0.1, r, 1), kind),
        post(drawn(s.hidden, 0.1, r, 1), kind), head(drawn(s.d, 0.1, r, 1), kind),
        x(drawn(s.vectors * s.hidden, 1, r), kind), cos(drawn(s.vectors * s.d, 1, r), kind),
        sin(drawn(s.vectors * s.d, 1, r), kind), attended(drawn(s.vectors * s.q_heads * s.d, 1, r), kind) {}

  static Numbers matrix(int out, int in, std::mt19937& r) { return drawn(out * in, 1 / std::sqrt(double(in)), r); }

  Linear linear(Stored& w, int in) { return {w.bytes.data(), nullptr, kind, in, int(w.numbers.size()) / in}; }

  DecoderLayer layer() {
    const uint8_t* heads = s.head_norms ? head.bytes.data() : nullptr;
    return {kind, input.bytes.data(), post.bytes.data(), heads, heads, linear(q, s.hidden), linear(k, s.hidden),
            linear(v, s.hidden), linear(o, s.q_heads * s.d), linear(gate, s.hidden), linear(up, s.hidden),
            linear(down, s.inner), float(EPS), s.d};
  }

  Numbers turned(Numbers y, int heads) const {
    if (s.head_norms) y = normed(y, head.numbers, EPS);
    const int half = s.d / 2;
    for (int at = 0; at < int(y.size()); at += s.d)
      for (int i = 0, token = at / s.d / heads * s.d; i < half; i++) {
        double &a = y[size_t(at + i)], &b = y[size_t(at + i + half)];
        const double before = a;
        a = a * cos.numbers[size_t(token + i)] - b * sin.numbers[size_t(token + i)];
        b = b * cos.numbers[size_t(token + i + half)] + before * sin.numbers[size_t(token + i + half)];
      }
    return y;
  }

  Numbers projected() const {
    const Numbers in = normed(x.numbers, input.numbers, EPS);
    const Numbers parts[] = {turned(product(q, in, s.hidden, s.vectors), s.q_heads),
                             turned(product(k, in, s.hidden, s.vectors), s.k_heads),
                             product(v, in, s.hidden, s.vectors)};
    Numbers y;
    for (int token = 0; token < s.vectors; token++)
      for (const Numbers& part : parts) {
        const auto row = std::ptrdiff_t(part.size()) / s.vectors;
        y.insert(y.end(), part.begin() + token * row, part.begin() + (token + 1) * row);
      }
    return y;
  }

  Numbers finished() const {
    Numbers sum = product(o, attended.numbers, s.q_heads * s.d, s.vectors);
    for (size_t i = 0; i < sum.size(); i++) sum[i] += x.numbers[i];
    const Numbers n = normed(sum, post.numbers, EPS), u = product(up, n, s.hidden, s.vectors);
    Numbers g = product(gate, n, s.hidden, s.vectors);
    for (size_t i = 0; i < g.size(); i++) g[i] = g[i] / (1 + std::exp(-g[i])) * u[i];
    const Numbers last = product(down, g, s.inner, s.vectors);
    for (size_t i = 0; i < sum.size(); i++) sum[i] += last[i];
    return sum;
  }
};

bool close(Guarded<uint8_t>& bytes, Kind kind, const Numbers& right) {
  std::vector<float> ours(right.size());
  encode_kernels("portable").load(bytes.data(), kind, int(ours.size()), ours.data());
  const double step = kind == Kind::fp32 ? 0 : kind == Kind::fp16 ? 0x1p-11 : 0x1p-8;
  double most = 0;
  for (double one : right) most = std::max(most, std::fabs(one));
  for (size_t i = 0; i < right.size(); i++)
    if (!(std::fabs(double(ours[i]) - right[i]) <= step * std::fabs(right[i]) + 4e-6 * most)) return false;
  return true;
}

int failures(const Sizes& s, Kind kind, std::mt19937& random) {
  Case one(s, kind, random);
  const DecoderLayer layer = one.layer();
  const Numbers into = one.projected(), out = one.finished();
  int failed = 0;
  for (const Choice& choice : choices())
    for (int threads = 1; choice.runs && threads <= 3; threads += 2) {
      const Processor on{*choice.kernels, encode_kernels(choice.kernels->name), threads};
      Guarded<uint8_t> y(into.size() * size_t(width_of(kind))), z(out.size() * size_t(width_of(kind)));
      project(layer, one.x.bytes.data(), one.cos.bytes.data(), one.sin.bytes.data(), s.vectors, y.data(), on);
      finish(layer, one.attended.bytes.data(), one.x.bytes.data(), s.vectors, z.data(), on);
      if (close(y, kind, into) && close(z, kind, out)) continue;
      failed++;
      std::printf("FAILED %s: kind %d, %d/%d heads of %d, %d, %d, %d vectors, %d threads\n", choice.kernels->name,
                  int(kind), s.q_heads, s.k_heads, s.d, s.hidden, s.inner, s.vectors, threads);
    }
  return failed;
}

int run() {
  std::mt19937 random(1);
  int cases = 0, failed = 0;
  for (Kind kind : {Kind::fp32, Kind::fp16, Kind::bf16})
    for (int vectors : {1, 2, 5, 8})
      for (bool norms : {false, true})
        for (const Sizes& s : {Sizes{9, 3, 64, 576, 96, vectors, norms}, Sizes{1, 1, 16, 16, 16, vectors, norms},
                               Sizes{4, 2, 80, 48, 272, vectors, norms}, Sizes{2, 1, 256, 64, 48, vectors, norms}})
          cases++, failed += failures(s, kind, random);
  std::printf("%d cases, %d failures\n", cases, failed);
  return failed ? 1 : 0;
}

}  // namespace

}  // namespace tersekv

int main() { return tersekv::run(); }
