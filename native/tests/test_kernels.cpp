// Every instruction set that runs here against golden cases, in memory that no kernel may leave.
//   test_kernels GOLDEN_FILE     prints what ran, and ends with 1 if anything was wrong
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <thread>

#include "golden.h"
#include "guarded.h"
#include "isas.h"
#include "parts.h"

namespace tersekv {

namespace {

int failures = 0;

// Number of elements beyond their bound; the worst one is printed.
void compare(const std::string& what, float* got, const std::vector<float>& right, const std::vector<float>& bound) {
  float worst = 0;
  size_t at = 0;
  for (size_t i = 0; i < right.size(); i++) {
    const float error = got[i] == right[i] ? 0 : std::fabs(got[i] - right[i]) - bound[i];
    if (!(error <= worst)) worst = error, at = i;  // NaN is beyond every bound
    if (std::isnan(error)) break;
  }
  if (worst == 0) return;
  failures++;
  std::printf("FAILED %s: element %zu is %g, should be %g within %g\n", what.c_str(), at, got[at], right[at],
              bound[at]);
}

// Rows (b, hq, n, d) in the order (b, n, hq, d), as hosts have them, in guarded memory; `turned` the other way round.
struct Turned {
  int b, hq, n, d;
  Guarded<float> data;
  Turned(const Golden& g)
      : b(g.sizes[0]), hq(g.sizes[1] * g.sizes[2]), n(g.sizes[3]), d(g.sizes[4]), data(g.q.size()) {}
  Strided strided() {
    const int64_t row = int64_t(d) * 4;
    return {reinterpret_cast<uint8_t*>(data.data()), Kind::fp32, row * hq * n, row, row * hq};
  }
  template <class Visit>
  void each_row(Visit visit) {
    const Strided rows = strided();
    for (int i = 0; i < b * hq * n; i++)
      visit(i, reinterpret_cast<float*>(rows.row(i / n / hq, i / n % hq, i % n)));
  }
};

// The inputs of a case, each in guarded memory.
struct Inputs {
  Guarded<uint8_t> k, v;
  Guarded<int32_t> table;
  Turned q;
  explicit Inputs(const Golden& g) : k(g.k_bytes), v(g.v_bytes), table(g.table), q(g) {
    q.each_row([&](int i, float* row) { std::copy_n(g.q.data() + int64_t(i) * q.d, q.d, row); });
  }
};

// Blocks from `first` on and, if `count` is not 0, so many of them.
Part part(const Golden& g, Inputs& in, int first, int count) {
  const int b = g.sizes[0], h = g.sizes[1], blocks = g.sizes[5];
  const int64_t bytes = g.sizes[6], rows = int64_t(b) * h;
  Part p{g.k, g.v, std::vector<Tokens>(size_t(rows)), nullptr, nullptr, b, h, g.sizes[4]};
  for (int64_t i = 0; i < rows; i++) {
    Tokens& t = p.rows[size_t(i)];
    const int64_t left = std::max<int64_t>(g.lengths[size_t(i)] - first * BLOCK, 0);
    t.length = t.last = count ? std::min<int64_t>(left, count * BLOCK) : left;
    if (blocks) {
      t.pool = in.k.data(), t.page_bytes = bytes, t.table = in.table.data() + i * blocks + first;
    } else {
      t.k = in.k.data() + i * int64_t(in.k.size()) / rows + first * BLOCK * bytes;
      t.v = in.v.data() + i * int64_t(in.v.size()) / rows + first * BLOCK * bytes;
      t.k_stride = t.v_stride = bytes;
    }
  }
  return p;
}

void check(const Golden& g, Inputs& in, const Kernels& kernels, bool exact, int threads,
           const std::vector<Part>& parts) {
  const Expected& right = exact ? g.exact : g.int8;
  Turned turned(g);
  Guarded<float> out(right.out.size()), lse(right.lse.size());
  Request r{{}, in.q.strided(), turned.strided(), lse.data(), g.sizes[0], g.sizes[1], g.sizes[2], g.sizes[3],
            g.sizes[4], g.scale[0], exact};
  for (const Part& one : parts) r.parts.push_back(&one);
  attend(r, kernels, encode_kernels(kernels.name), threads);
  turned.each_row([&](int i, float* row) { std::copy_n(row, turned.d, out.data() + int64_t(i) * turned.d); });
  const std::string what = std::string(kernels.name) + (exact ? " exact, " : " int8, ") + std::to_string(parts.size()) +
                           " parts, " + g.name;
  compare(what, out.data(), right.out, right.out_bound);
  compare(what + ", lse", lse.data(), right.lse, right.lse_bound);
}

void check_all(const Golden& g, int threads) {
  Inputs in(g);
  for (const Choice& choice : choices())
    for (int exact = 0; choice.runs && exact < 2; exact++) {
      check(g, in, *choice.kernels, exact, threads, {part(g, in, 0, 0)});
      check(g, in, *choice.kernels, exact, threads, {part(g, in, 1, 0), part(g, in, 0, 1)});
    }
}

int run(const char* path) {
  Reader reader(path);
  const int count = reader.many<int32_t>().at(0);
  std::vector<Golden> cases;
  for (int i = 0; i < count; i++) cases.emplace_back(reader);
  for (const Golden& g : cases) check_all(g, 3);
  // Two callers at once: one of them finds the threads taken.
  std::thread other([&] { check_all(cases.front(), 2); });
  check_all(cases.back(), 2);
  other.join();
  for (const Choice& choice : choices())
    std::printf("%s: %s\n", choice.kernels->name, choice.runs ? "ran" : choice.why);
  std::printf("%d cases, %d failures\n", count, failures);
  return failures ? 1 : 0;
}

}  // namespace

}  // namespace tersekv

int main(int count, char** arguments) {
  if (count != 2) return std::fprintf(stderr, "usage: test_kernels GOLDEN_FILE\n"), 2;
  return tersekv::run(arguments[1]);
}
