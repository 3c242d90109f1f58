// Every instruction set that runs here against golden cases, in memory that no kernel may leave.
//   test_kernels GOLDEN_FILE     prints what ran, and ends with 1 if anything was wrong
#include <cmath>
#include <cstdio>
#include <thread>

#include "attend.h"
#include "golden.h"
#include "guarded.h"
#include "isas.h"

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
  std::printf("FAILED %s: element %zu is %g, should be %g within %g\n", what.c_str(), at, got[at], right[at], bound[at]);
}

// The inputs of a case, each in guarded memory.
struct Inputs {
  Guarded<uint8_t> k, v;
  Guarded<int32_t> table;
  Guarded<float> q;
  explicit Inputs(const Golden& g) : k(g.k_bytes), v(g.v_bytes), table(g.table), q(g.q) {}
};

Attention request(const Golden& g, Inputs& in, float* out, float* lse, bool exact) {
  const int b = g.sizes[0], h = g.sizes[1], n = g.sizes[3], d = g.sizes[4], blocks = g.sizes[5];
  const int64_t bytes = g.sizes[6];
  Attention a{&g.k, &g.v, std::vector<Tokens>(size_t(b) * h), in.q.data(), out, lse, g.sizes[2] * n, d, n, g.scale[0],
              exact};
  const int64_t rows = int64_t(a.tokens.size());
  for (int64_t i = 0; i < rows; i++) {
    Tokens& t = a.tokens[size_t(i)];
    t.length = t.last = g.lengths[size_t(i)];
    if (blocks) {
      t.pool = in.k.data(), t.page_bytes = bytes, t.table = in.table.data() + i * blocks;
    } else {
      t.k = in.k.data() + i * int64_t(in.k.size()) / rows, t.v = in.v.data() + i * int64_t(in.v.size()) / rows;
      t.k_stride = t.v_stride = bytes;
    }
  }
  return a;
}

void check(const Golden& g, Inputs& in, const Kernels& kernels, bool exact, int threads) {
  const Expected& right = exact ? g.exact : g.int8;
  Guarded<float> out(right.out.size()), lse(right.lse.size());
  attend(request(g, in, out.data(), lse.data(), exact), kernels, threads);
  const std::string what = std::string(kernels.name) + (exact ? " exact, " : " int8, ") + g.name;
  compare(what, out.data(), right.out, right.out_bound);
  compare(what + ", lse", lse.data(), right.lse, right.lse_bound);
}

void check_all(const Golden& g, int threads) {
  Inputs in(g);
  for (const Choice& choice : choices())
    for (int exact = 0; choice.runs && exact < 2; exact++) check(g, in, *choice.kernels, exact, threads);
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
