#include "attend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "isas.h"

namespace tersekv {

namespace {

// Tokens of one job: JOBS of a sequence's KV heads, the same for any number of threads and beside any other sequence.
// With its data in memory a job costs about as much to begin and end as 250 tokens; with books, which it multiplies
// with its queries, as 300 more.
int64_t split(int64_t length, int heads, bool books) {
  constexpr int64_t JOBS = 32, STEP = BLOCK * TILE;
  const int64_t parts = std::max<int64_t>(1, JOBS / heads), least = books ? 2048 : 1024;
  return std::max(least, (length / parts + STEP - 1) / STEP * STEP);
}

Scratch& scratch() {
  thread_local std::unique_ptr<Scratch> mine(new Scratch);
#ifdef TERSEKV_POISON
  std::memset(static_cast<void*>(mine.get()), 0xff, sizeof(Scratch));
#endif
  mine->log8 = log8_values();
  return *mine;
}

}  // namespace

std::vector<Piece> cut(const Attention& a) {
  std::vector<Piece> pieces;
  size_t at = 0;
  for (int head = 0; head < int(a.tokens.size()); head++) {
    const int64_t length = a.tokens[head].length, each = split(length, a.heads, a.k->books || a.v->books);
    const int parts = length > each ? int((length + each - 1) / each) : 1;
    for (int row = 0; row < a.rows; row += ROWS) {
      const int rows = a.rows - row < ROWS ? a.rows - row : ROWS;
      for (int part = 0; part < parts; part++, at += rows) {
        const int64_t last = part + 1 < parts ? (part + 1) * each : length;
        pieces.push_back({head, row, rows, part, parts, part * each, last, at});
      }
    }
  }
  return pieces;
}

void run_piece(const Attention& a, const Kernels& kernels, const Piece& p, const Piece* next, float* partial) {
  Job job{a.k, a.v, a.tokens[p.head], a.q + (int64_t(p.head) * a.rows + p.first_row) * a.d, p.rows, a.d, a.n,
          p.first_row, a.scale, a.exact, p.head % a.heads, hints()};
  if (p.first > job.tokens.first) job.tokens.first = p.first;
  job.tokens.last = p.last;
  if (next && job.tokens.table) {
    job.tokens.next = a.tokens[next->head].table + next->first / BLOCK;
    job.tokens.next_count = (next->last - next->first + BLOCK - 1) / BLOCK;
  }
  float max[ROWS + STRIP], sum[ROWS];  // the maxima of a strip are written as four, however many rows it has
  kernels.attend(job, scratch(), {partial, max, sum});
  for (int r = 0; r < p.rows; r++) {  // a partial result is an output and its log-sum-exp, as everywhere else
    float* out = partial + int64_t(r) * a.d;
    const float inverse = sum[r] > 0 ? 1 / sum[r] : 0;
    for (int c = 0; c < a.d; c++) out[c] *= inverse;
    partial[int64_t(p.rows) * a.d + r] = sum[r] > 0 ? (max[r] + std::log2(sum[r])) * 0.69314718f : -INFINITY;
  }
}

void merge(float* const* outs, float* const* lses, int count, int64_t rows, int d) {
  for (int64_t r = 0; r < rows; r++) {
    float top = -INFINITY;
    for (int i = 0; i < count; i++) top = std::fmax(top, lses[i][r]);
    if (top == -INFINITY) continue;  // nobody saw a token: part 0 holds zeros already
    float sum = 0;
    for (int i = 0; i < count; i++) sum += std::exp(lses[i][r] - top);
    float* out = outs[0] + r * d;
    for (int i = 0; i < count; i++) {
      const float share = std::exp(lses[i][r] - top) / sum;
      const float* other = outs[i] + r * d;
      for (int c = 0; c < d; c++) out[c] = (i ? out[c] : 0) + share * other[c];
    }
    lses[0][r] = top + std::log(sum);
  }
}

const float* log8_values() {
  static const std::vector<float> values = [] {
    std::vector<float> v(256);
    for (int i = 1; i < 256; i++) v[i] = float(std::exp2((i - 144) / 12.0));
    return v;
  }();
  return values.data();
}

}  // namespace tersekv
