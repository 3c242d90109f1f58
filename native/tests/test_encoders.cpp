// Every instruction set that runs here against the portable one, byte by byte, in memory that no encoder may leave. The
// portable one is compared with the reference by the tests of the Python module.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>

#include "encode.h"
#include "guarded.h"
#include "isas.h"

namespace tersekv {

namespace {

Encoder table(int d, int bits, bool rotated, bool unbiased, Kind kind) {
  Encoder e;
  e.method = Method::table, e.d = d, e.bits = bits, e.codes = 0;
  const int codes = BLOCK * d * bits / 8, half = 1 << (bits - 1);
  e.scale = {kind, codes, -1};
  if (rotated) e.channel_zero = {Kind::int8, codes + 4 * BLOCK, codes + 4 * BLOCK + d};
  e.nbytes = codes + 4 * BLOCK + d + 2;
  for (int i = 0; i < 256; i++) {
    e.thresholds[i] = i + 1 < half ? 2.5f * float(i + 1) / float(half) : INFINITY;
    e.centroids[i] = i < 2 * half ? 2.5f * (float(i - half) + 0.5f) / float(half) : 0;
  }
  e.unbiased = unbiased, e.rotated = rotated, e.root_d = std::sqrt(float(d)), e.factor = 0.125f;
  for (int c = 0; c < d; c++) e.signs[c] = c * c % 7 < 4 ? 1.f : -1.f;
  set_bins(e);
  std::vector<float> edges;
  for (int i = 1; i < 255; i++) edges.push_back(float(std::exp2((i - 143.5) / 12)));
  set_log8(e.log8, edges, 1.3e-4f);
  return e;
}

Encoder trellis(int d, int bits, bool rotated, bool unbiased, Kind kind) {
  Encoder e = table(d, bits, rotated, unbiased, kind);
  e.method = Method::trellis, e.per_unit = 72;
  for (int i = 0; i < 256; i++) {
    const int odd = 37 * (i & 127) % 128 * 2 - 127;
    e.odd[i] = int16_t(i < 128 ? odd : -odd), e.centroids[i] = float(e.odd[i]) / 36;
  }
  return e;
}

Encoder uniform(int d, int bits, bool by_channel, bool symmetric) {
  Encoder e;
  e.method = Method::uniform, e.d = d, e.bits = bits;
  const int codes = BLOCK * d * bits / 8, count = by_channel ? d : BLOCK, top = (1 << (bits - symmetric)) - 1;
  (by_channel ? e.channel_scale : e.scale) = {Kind::fp16, codes, -1};
  (by_channel ? e.channel_zero : e.zero) = {Kind::fp16, codes + 2 * count, -1};
  e.nbytes = codes + 4 * count;
  e.symmetric = symmetric, e.low = symmetric ? -top - 1 : 0, e.high = top, e.inverse_top = float(1.0 / top);
  return e;
}

Encoder dense(int d, Kind kind) {
  Encoder e;
  e.d = d, e.values = {kind, 0, -1}, e.nbytes = BLOCK * d * (kind == Kind::fp32 ? 4 : 2);
  return e;
}

std::vector<Encoder> encoders(int d) {
  std::vector<Encoder> all = {dense(d, Kind::fp32), dense(d, Kind::fp16), dense(d, Kind::bf16)};
  for (int bits : {1, 2, 3, 4, 8}) {
    all.push_back(table(d, bits, false, false, Kind::fp16));
    all.push_back(table(d, bits, true, true, Kind::log8));
    if (bits < 8 && d % 32 == 0 && d <= 128) all.push_back(trellis(d, bits, bits % 2, bits < 3, Kind::log8));
    for (int how = 0; how < 4 && bits > 1; how++) all.push_back(uniform(d, bits, how & 1, how & 2));
  }
  return all;
}

// Values of every size, whole blocks of one kind among them. `bytes` of 16-bit kinds are any finite numbers.
std::vector<uint8_t> values(int d, Kind kind, int round, std::mt19937& random) {
  std::vector<uint8_t> bytes;
  std::normal_distribution<float> normal;
  const float size = std::pow(10.f, float(round % 9) * 4 - 20);
  for (int i = 0; i < BLOCK * d; i++) {
    if (kind == Kind::fp32) {
      const float x = round == 10 ? 0 : round == 11 ? 3.f : size * normal(random) * (i % d == 5 ? 100 : 1);
      const uint8_t* p = reinterpret_cast<const uint8_t*>(&x);
      bytes.insert(bytes.end(), p, p + 4);
    } else {
      const uint32_t sign = random() & 0x8000, rest = random() % (kind == Kind::fp16 ? 0x7c00 : 0x5000);
      bytes.push_back(uint8_t(rest | sign)), bytes.push_back(uint8_t((rest | sign) >> 8));
    }
  }
  return bytes;
}

bool same(const Encoder& e, Guarded<uint8_t>& in, Kind kind, const EncodeKernels& kernels,
          std::vector<uint8_t>& expected) {
  Guarded<uint8_t> out(size_t(e.nbytes));
  encode(e, {Input{in.data(), e.d * (kind == Kind::fp32 ? 4 : 2), kind}}, {out.data()}, kernels, 1);
  const std::vector<uint8_t> got(out.data(), out.data() + e.nbytes);
  if (expected.empty()) expected = got;
  return got == expected;
}

// Channel after channel, as the reference goes. GCC for ARM would contract what is not volatile.
std::vector<uint8_t> steered(const Encoder& e, std::vector<float> w, const std::vector<float>& passed) {
  const int half = 1 << (e.bits - 1), first = e.bits > 4 ? 128 - half : 0;
  std::vector<uint8_t> codes;
  for (float* x = w.data(); x < w.data() + w.size(); x += e.d)
    for (int c = 0; c < e.d; c++) {
      int level = 0;
      while (level < half - 1 && !(e.thresholds[level] >= std::fabs(x[c]))) level++;
      codes.push_back(uint8_t(x[c] < 0 ? half - 1 - level : half + level));
      const float error = x[c] - e.centroids[first + codes.back()];
      for (int later = c + 1; later < e.d; later++) {
        const volatile float product = passed[size_t(c * e.d + later)] * error;
        x[later] -= product;
      }
    }
  return codes;
}

// Error feedback against the above; returns how many instruction sets differ.
int steering_failures(int d, int bits, int round, std::mt19937& random) {
  Encoder e = table(d, bits, false, false, Kind::fp32);
  if (bits > 4) std::copy_backward(e.centroids, e.centroids + (1 << bits), e.centroids + 128 + (1 << bits) / 2);
  std::normal_distribution<float> normal;
  std::vector<float> z, passed;
  for (int i = 0; i < BLOCK * d; i++) {
    const float odd = i % 97 == 5 ? INFINITY : i % 89 == 7 ? NAN : 0;
    z.push_back(round == 0 ? normal(random) : float(random() % 5) - 2 + odd);
  }
  for (int i = 0; i < d * d; i++) passed.push_back(i % d > i / d ? normal(random) / 4 : NAN);  // the rest is not read
  const std::vector<uint8_t> expected = steered(e, z, passed);
  Guarded<float> in(z), matrix(passed);
  int failures = 0;
  for (const Choice& choice : choices()) {
    if (!choice.runs) continue;
    Guarded<uint8_t> out(expected.size());
    steer(e, {Input{reinterpret_cast<uint8_t*>(in.data()), 4 * d, Kind::fp32}}, {matrix.data()}, {out.data()},
          encode_kernels(choice.kernels->name), 1);
    if (std::equal(expected.begin(), expected.end(), out.data())) continue;
    failures++;
    std::printf("FAILED %s: feedback, bits %d d %d round %d\n", choice.kernels->name, bits, d, round);
  }
  return failures;
}

int run() {
  int cases = 0, failures = 0;
  std::mt19937 random(1);
  for (int d : {16, 64, 80, 96, 128, 512})
    for (Encoder& e : encoders(d))
      for (Order order : {Order::linear, Order::simd_k, Order::simd_v, Order::trellis_k, Order::trellis_v})
        for (int round = 0; round < 14; round++) {
          if (in_words(order) != (e.method == Method::trellis && order != Order::linear)) continue;
          cases++;
          e.order = order;
          const Kind kind = round < 12 ? Kind::fp32 : round == 12 ? Kind::fp16 : Kind::bf16;
          Guarded<uint8_t> in(values(d, kind, round, random));
          std::vector<uint8_t> expected;
          same(e, in, kind, encode_kernels("portable"), expected);
          for (const Choice& choice : choices())
            if (choice.runs && !same(e, in, kind, encode_kernels(choice.kernels->name), expected)) {
              failures++;
              std::printf("FAILED %s: method %d bits %d d %d order %d round %d\n", choice.kernels->name, int(e.method),
                          e.bits, d, int(order), round);
            }
        }
  for (int d : {16, 64, 80, 128, 512})
    for (int bits = 1; bits <= 8; bits++)
      for (int round = 0; round < 2; round++) cases++, failures += steering_failures(d, bits, round, random);
  for (const Choice& choice : choices())
    std::printf("%s: %s\n", choice.kernels->name, choice.runs ? "ran" : choice.why);
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures ? 1 : 0;
}

}  // namespace

}  // namespace tersekv

int main() { return tersekv::run(); }
