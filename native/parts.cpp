#include "parts.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "pool.h"

namespace tersekv {

namespace {

constexpr int64_t ROWS_EACH = 64;   // queries that a thread reads at once
constexpr int64_t ALONE = 1 << 20;  // multiplications in 40 us; to wake another thread takes 11 (Zen 4)

// Index of a rotation among the known ones, of which the first is none.
size_t index_of(std::vector<const float*>& known, const float* multipliers) {
  const size_t at = size_t(std::find(known.begin(), known.end(), multipliers) - known.begin());
  if (at == known.size()) known.push_back(multipliers);
  return at;
}

class Step {
 public:
  Step(const Request& request, const Kernels& kernels, const EncodeKernels& rows, int threads)
      : r_(request), kernels_(kernels), rows_(rows), per_head_(request.g * request.n),
        tiles_((per_head_ + ROWS - 1) / ROWS) {
    int64_t work = 0;
    for (const Part* part : r_.parts) {
      int64_t tokens = 0;
      for (const Tokens& t : part->rows) tokens += t.length;
      if (tokens) add(*part);
      work += tokens * per_head_ * r_.d;
    }
    threads_ = work < ALONE ? 1 : threads;
  }

  void operator()() {
    read_queries();
    size_t rows = 0;
    std::vector<std::pair<size_t, const Piece*>> tasks;
    for (size_t i = 0; i < plans_.size(); i++) {
      Plan& plan = plans_[i];
      plan.attention.q = queries_.get() + plan.in * queries() * r_.d;
      plan.pieces = cut(plan.attention);
      plan.first = rows;
      if (!plan.pieces.empty()) rows += plan.pieces.back().at + size_t(plan.pieces.back().rows);
      for (const Piece& piece : plan.pieces) {
        if (piece.part == 0) plan.groups.push_back(&piece);
        tasks.emplace_back(i, &piece);
      }
    }
    partials_.reset(new float[rows * size_t(r_.d + 1)]);
    Pool::shared().run(int(tasks.size()), threads_, [&](int i) {
      const auto& [at, piece] = tasks[size_t(i)];
      const Plan& plan = plans_[at];
      const bool more = plan.pieces.data() + plan.pieces.size() - piece > threads_;
      run_piece(plan.attention, kernels_, *piece, more ? piece + threads_ : nullptr, partial(plan, *piece));
    });
    Pool::shared().run(r_.b * r_.h * tiles_, threads_, [&](int i) { join(i / tiles_, i % tiles_); });
  }

 private:
  // A part that has tokens: the domains of its keys and values, and its pieces.
  struct Plan {
    Attention attention = {};
    size_t in = 0, out = 0, first = 0;  // `first`: of its partial results, in rows
    std::vector<Piece> pieces;
    std::vector<const Piece*> groups;  // by KV head and tile of query rows: the first of its pieces
  };

  const Request& r_;
  const Kernels& kernels_;
  const EncodeKernels& rows_;
  const int per_head_, tiles_;  // query rows of a KV head, and strips of up to ROWS of them
  int threads_;
  std::vector<const float*> in_ = {nullptr}, out_ = {nullptr};  // distinct rotations of keys and of values
  std::vector<size_t> strides_ = {0};                           // of in_, from one row (sequence x KV head) to the next
  std::vector<Plan> plans_;
  std::unique_ptr<float[]> queries_;  // (in, b, hq, n, d)
  std::unique_ptr<float[]> partials_;

  void add(const Part& part) {
    Plan plan;
    plan.attention = Attention{&part.k, &part.v, part.rows, nullptr, per_head_, r_.d, r_.n, r_.h, r_.scale, r_.exact};
    plan.in = index_of(in_, part.before), plan.out = index_of(out_, part.after);
    if (plan.in == strides_.size()) strides_.push_back(part.before_each_row ? size_t(r_.d) : 0);
    plans_.push_back(std::move(plan));
  }

  size_t queries() const { return size_t(r_.b) * r_.h * size_t(per_head_); }

  float* partial(const Plan& plan, const Piece& piece) const {
    return partials_.get() + (plan.first + piece.at) * size_t(r_.d + 1);
  }

  template <class Visit>
  void each_query(int64_t first, int64_t last, Visit visit) const {
    for (int64_t i = first; i < last; i++) {
      const int64_t head = i / r_.n;
      visit(i, int(head / (r_.h * r_.g)), int(head % (r_.h * r_.g)), int(i % r_.n));
    }
  }

  void read_queries() {
    const int64_t count = int64_t(queries());
    queries_.reset(new float[in_.size() * queries() * r_.d]);
    Pool::shared().run(int((count + ROWS_EACH - 1) / ROWS_EACH), threads_, [&](int task) {
      each_query(task * ROWS_EACH, std::min(count, (task + 1) * ROWS_EACH), [&](int64_t i, int b, int hq, int t) {
        float* plain = queries_.get() + i * r_.d;
        rows_.load(r_.q.row(b, hq, t), r_.q.kind, r_.d, plain);
        for (size_t in = 1; in < in_.size(); in++)
          rows_.rotate(plain, r_.d, in_[in] + size_t(b * r_.h + hq / r_.g) * strides_[in], nullptr,
                       plain + in * queries() * size_t(r_.d));
      });
    });
  }

  // A partial result of some query rows, and the domain it is in.
  struct Result {
    const float *out, *lse;
    size_t domain;
  };

  std::vector<Result> results(int head, int tile) const {
    std::vector<Result> all;
    for (const Plan& plan : plans_) {
      const Piece* piece = plan.groups[size_t(head * tiles_ + tile)];
      for (int i = 0; i < piece->parts; i++) {
        const float* out = partial(plan, piece[i]);
        all.push_back({out, out + int64_t(piece->rows) * r_.d, plan.out});
      }
    }
    return all;
  }

  void join(int head, int tile) {
    const std::vector<Result> all = results(head, tile);
    const int first = tile * ROWS, count = std::min(ROWS, per_head_ - first);
    const int64_t start = int64_t(head) * per_head_ + first;
    alignas(64) float whole[MAX_HEAD_DIM];
    each_query(start, start + count, [&](int64_t i, int b, int hq, int t) {
      const float lse = join_row(all, int(i - start), whole);
      float spoilt = 0;  // NaN if the query is not finite: kernels would hide that, a dense cache does not
      for (int c = 0; c < r_.d; c++) spoilt += queries_[size_t(i) * r_.d + c] * 0;
      for (int c = 0; c < r_.d; c++) whole[c] += spoilt;
      rows_.store(whole, r_.out.kind, r_.d, r_.out.row(b, hq, t));
      if (r_.lse) r_.lse[i] = lse;
    });
  }

  // Outputs weighted by their share of the exponentials: summed in each domain, then brought to the model's.
  float join_row(const std::vector<Result>& all, int row, float* whole) const {
    float top = -INFINITY, sum = 0;
    for (const Result& one : all) top = std::fmax(top, one.lse[row]);
    std::fill(whole, whole + r_.d, 0.f);
    if (top == -INFINITY) return top;  // nobody saw a token
    for (const Result& one : all) sum += std::exp(one.lse[row] - top);
    for (size_t domain = 0; domain < out_.size(); domain++) {
      alignas(64) float part[MAX_HEAD_DIM] = {};
      for (const Result& one : all) {
        if (one.domain != domain) continue;
        const float share = std::exp(one.lse[row] - top) / sum;
        const float* out = one.out + int64_t(row) * r_.d;
        for (int c = 0; c < r_.d; c++) part[c] += share * out[c];
      }
      if (domain) rows_.rotate(part, r_.d, nullptr, out_[domain], part);
      for (int c = 0; c < r_.d; c++) whole[c] += part[c];
    }
    return top + std::log(sum);
  }
};

}  // namespace

void attend(const Request& request, const Kernels& kernels, const EncodeKernels& rows, int threads) {
  Step(request, kernels, rows, threads)();
}

}  // namespace tersekv
