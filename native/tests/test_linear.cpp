// Linear layers of every instruction set that runs here, in memory that no kernel may leave. Numbers are small
// integers, whose sums are exact in fp32 and, as they are below 256, in all three types.
#include <cstdio>
#include <random>

#include "guarded.h"
#include "isas.h"
#include "linear.h"

namespace tersekv {

namespace {

using Numbers = std::vector<float>;

Numbers integers(size_t count, int most, std::mt19937& random) {
  Numbers x(count);
  for (float& one : x) one = float(int(random() % unsigned(2 * most + 1)) - most);
  return x;
}

std::vector<uint8_t> stored(const Numbers& x, Kind kind, const EncodeKernels& rows) {
  if (x.empty()) return {};
  Numbers padded = x;
  padded.resize((x.size() + 3) / 4 * 4);
  std::vector<uint8_t> bytes(padded.size() * 4);
  rows.store(padded.data(), kind, int(padded.size()), bytes.data());
  bytes.resize(x.size() * (kind == Kind::fp32 ? 4 : 2));
  return bytes;
}

Numbers expected(const Numbers& w, const Numbers& x, const Numbers& bias, int in, int out, int vectors) {
  Numbers y;
  for (int v = 0; v < vectors; v++)
    for (int o = 0; o < out; o++) {
      float sum = bias.empty() ? 0 : bias[size_t(o)];
      for (int c = 0; c < in; c++) sum += w[size_t(o * in + c)] * x[size_t(v * in + c)];
      y.push_back(sum);
    }
  return y;
}

int failures(Kind kind, int in, int out, int vectors, bool biased, std::mt19937& random) {
  const EncodeKernels& portable = encode_kernels("portable");
  // A sum is at most 2 * 16 ones in size, and 9.
  Numbers x(size_t(vectors * in)), w = integers(size_t(out * in), 2, random);
  for (int v = 0; v < vectors; v++)
    for (int i = 0; i < 16; i++) x[size_t(v * in) + random() % unsigned(in)] = random() % 2 ? 1.f : -1.f;
  const Numbers bias = integers(biased ? size_t(out) : 0, 9, random);
  const std::vector<uint8_t> right = stored(expected(w, x, bias, in, out, vectors), kind, portable);
  Guarded<uint8_t> weights(stored(w, kind, portable)), inputs(stored(x, kind, portable));
  Guarded<uint8_t> added(stored(bias, kind, portable));
  int failed = 0;
  for (const Choice& choice : choices())
    for (int threads = 1; choice.runs && threads <= 3; threads += 2) {
      Guarded<uint8_t> y(right.size());
      linear({weights.data(), biased ? added.data() : nullptr, kind, in, out}, inputs.data(), vectors, y.data(),
             {*choice.kernels, encode_kernels(choice.kernels->name), threads});
      if (std::memcmp(y.data(), right.data(), right.size()) == 0) continue;
      failed++;
      std::printf("FAILED %s: kind %d, in %d, out %d, %d vectors, bias %d, %d threads\n", choice.kernels->name,
                  int(kind), in, out, vectors, biased, threads);
    }
  return failed;
}

int run() {
  std::mt19937 random(1);
  int cases = 0, failed = 0;
  for (Kind kind : {Kind::fp32, Kind::fp16, Kind::bf16})
    for (int in : {16, 48, 64, 80, 576, 1040})
      for (int out : {1, 3, 4, 7, 64, 261})
        for (int vectors : {1, 2, 3, 4, 5, 8})
          for (bool biased : {false, true}) cases++, failed += failures(kind, in, out, vectors, biased, random);
  std::printf("%d cases, %d failures\n", cases, failed);
  return failed ? 1 : 0;
}

}  // namespace

}  // namespace tersekv

int main() { return tersekv::run(); }
