// Arrays from Python to parts and requests. All that an index could go wrong on is checked here, before any read.
#include "attend_bindings.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <memory>
#include <optional>

#include "arrays.h"
#include "isas.h"
#include "parts.h"
#include "require.h"
#include "side.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tersekv {

namespace {

using Pool8 = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Table32 = nb::ndarray<const int32_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Lengths64 = nb::ndarray<const int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Padding64 = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Multipliers = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Values = nb::ndarray<nb::ro, nb::ndim<4>, nb::device::cpu>;
using Written = nb::ndarray<nb::ndim<4>, nb::device::cpu>;
using Floats4 = nb::ndarray<float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Lse = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

Side* new_side(int bits, int d, int start, int bytes, int codes, const std::vector<PlaneArgs>& planes,
               const std::vector<float>& table, float half, bool channels_first) {
  return new Side(make_side(bits, d, start, bytes, codes, planes, table, half, channels_first));
}

using Stage = nb::ndarray<const float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;

Side* new_books_side(int d, int start, int bytes, const std::vector<int>& codes, const std::vector<PlaneArgs>& planes,
                     int index, const std::vector<Stage>& stages) {
  require(!stages.empty() && codes.size() == stages.size(), stages.size(), " stages with ", codes.size(),
          " planes of codes.");
  const Stage& first = stages[0];
  std::vector<std::vector<float>> numbers;
  for (const Stage& stage : stages) {
    for (int i = 0; i < 4; i++)
      require(stage.shape(i) == first.shape(i), "Stages ", shape(first), " and ", shape(stage),
              ". Both must have one shape.");
    numbers.emplace_back(stage.data(), stage.data() + stage.size());
  }
  auto books = make_books(index, int(first.shape(0)), int(first.shape(1)), int(first.shape(3)), std::move(numbers));
  return new Side(make_books_side(d, start, bytes, codes.front(), codes.back(), planes, std::move(books)));
}

// A part, and the arrays that it points into.
struct HeldPart : Part {
  std::vector<nb::ndarray<>> arrays;
  bool causal = false;
};

// Of a rotation: (1, d), or (rows, d) where each row (sequence x KV head) may have its own.
const float* multipliers_of(const std::optional<Multipliers>& x, int64_t rows, HeldPart& part) {
  if (!x) return nullptr;
  require(int(x->shape(1)) == part.d && part.d % 16 == 0 && (x->shape(0) == 1 || int64_t(x->shape(0)) == rows),
          "Multipliers (", x->shape(0), ", ", x->shape(1), ") at head_dim ", part.d, " and ", rows,
          " rows. A rotation needs one for each channel, once or for each row, and a multiple of 16 channels.");
  part.arrays.emplace_back(*x);
  return x->data();
}

// The blocks that count must lie in pages that there are: kernels follow the table blindly.
void check_tokens(const Tokens& t, size_t row, int64_t blocks, int64_t pages) {
  require(t.length >= 0 && t.length <= blocks * BLOCK, "Row ", row, " (sequence x KV head) has length ", t.length,
          ", its page table has ", blocks, " blocks. Allowed: 0 to ", blocks * BLOCK, ".");
  for (int64_t j = 0; j * BLOCK < t.length; j++)
    require(t.table[j] >= 0 && t.table[j] < pages, "Block ", j, " of row ", row, " (sequence x KV head) is in page ",
            t.table[j], ". The pool has ", pages, " pages: name one of them, or shorten the row's length ", t.length,
            ".");
}

HeldPart* pages_part(Pool8 pool, Table32 table, Lengths64 lengths, const Side& k, const Side& v,
                     std::optional<Multipliers> before, std::optional<Multipliers> after) {
  const int64_t pages = int64_t(pool.shape(0)), bytes = int64_t(pool.shape(1)), blocks = int64_t(table.shape(2));
  require(k.d == v.d, "Keys of head_dim ", k.d, ", values of ", v.d, ". Both must be the same.");
  require(k.start + k.bytes == v.start && v.start + v.bytes == bytes, "Pages of ", bytes,
          " bytes. Their layouts say ", k.bytes, " of keys and ", v.bytes, " of values.");
  require(lengths.shape(0) == table.shape(0) && lengths.shape(1) == table.shape(1), "lengths ", shape(lengths),
          " must be (b, h) of the page table ", shape(table), ".");
  for (const Side* side : {&k, &v})
    require(!side->books || side->books->heads == 1 || side->books->heads == int(table.shape(1)), "Books of ",
            side->books ? side->books->heads : 0, " KV heads, a page table of ", table.shape(1),
            ". Both must be the same.");
  auto part = std::make_unique<HeldPart>();
  part->k = k, part->v = v, part->d = k.d, part->b = int(table.shape(0)), part->h = int(table.shape(1));
  part->rows.resize(size_t(part->b) * size_t(part->h));
  for (size_t i = 0; i < part->rows.size(); i++) {
    Tokens& t = part->rows[i];
    t.pool = pool.data(), t.page_bytes = bytes, t.table = table.data() + int64_t(i) * blocks;
    t.length = t.last = lengths.data()[i];
    check_tokens(t, i, blocks, pages);
  }
  part->arrays.emplace_back(pool), part->arrays.emplace_back(table);
  part->before = multipliers_of(before, int64_t(part->rows.size()), *part);
  part->after = multipliers_of(after, 1, *part);
  part->before_each_row = before && before->shape(0) > 1;
  return part.release();
}

template <class Array>
Strided strided(const Array& x, const char* what) {
  const int64_t size = int64_t(x.itemsize());
  require(x.size() == 0 || x.shape(3) < 2 || x.stride(3) == 1, "Channels of ", what, " ", shape(x), " lie ",
          x.stride(3), " elements apart. They must be contiguous: call .contiguous().");
  auto* data = static_cast<uint8_t*>(const_cast<void*>(static_cast<const void*>(x.data())));
  return {data, kind_of(x, what), x.stride(0) * size, x.stride(1) * size, x.stride(2) * size};
}

std::unique_ptr<HeldPart> dense_rows(const Values& k, const Values& v) {
  for (int i = 0; i < 4; i++)
    require(k.shape(i) == v.shape(i), "Keys ", shape(k), ", values ", shape(v), ". Both must have one shape.");
  auto part = std::make_unique<HeldPart>();
  part->b = int(k.shape(0)), part->h = int(k.shape(1)), part->d = int(k.shape(3));
  const Strided keys = strided(k, "keys"), values = strided(v, "values");
  part->k.values.kind = keys.kind, part->v.values.kind = values.kind;
  for (int i = 0; i < part->b; i++)
    for (int j = 0; j < part->h; j++) {
      Tokens t;
      t.k = keys.row(i, j, 0), t.v = values.row(i, j, 0), t.k_stride = keys.token, t.v_stride = values.token;
      part->rows.push_back(t);
    }
  part->arrays.emplace_back(k), part->arrays.emplace_back(v);
  return part;
}

HeldPart* dense_part(Values k, Values v, Lengths64 lengths, std::optional<Padding64> padding, bool causal) {
  auto part = dense_rows(k, v);
  part->causal = causal;
  require(int(lengths.shape(0)) == part->b && int(lengths.shape(1)) == part->h, "lengths ", shape(lengths),
          " must be (b, h) of the keys ", shape(k), ".");
  require(!padding || int(padding->shape(0)) == part->b, "padding ", padding ? shape(*padding) : "",
          " must be (b) of the keys ", shape(k), ".");
  for (size_t i = 0; i < part->rows.size(); i++) {
    Tokens& t = part->rows[i];
    t.first = padding ? padding->data()[int(i) / part->h] : 0, t.causal = causal;
    t.length = t.last = lengths.data()[i];
    require(t.length >= 0 && t.length <= int64_t(k.shape(2)), "Row ", i, " (sequence x KV head): length ", t.length,
            ". Allowed: 0 to the ", k.shape(2), " tokens of its keys.");
    require(t.first >= 0, "Row ", i, " (sequence x KV head): padding ", t.first, ". Allowed: 0 and more.");
  }
  return part.release();
}

// No NaN and no infinity: an exponent of ones.
template <class Word>
bool finite_words(const uint8_t* row, int count, Word exponent) {
  Word found = 0;
  for (int c = 0; c < count; c++) {
    Word word;
    std::memcpy(&word, row + sizeof(Word) * size_t(c), sizeof(Word));
    found |= Word((word & exponent) == exponent);
  }
  return !found;
}

bool all_finite(const uint8_t* row, Kind kind, int count) {
  if (kind == Kind::fp32) return finite_words<uint32_t>(row, count, 0x7f800000u);
  return finite_words<uint16_t>(row, count, kind == Kind::fp16 ? 0x7c00 : 0x7f80);
}

void check_heads(const Part& part, const Request& r, int hq) {
  require(part.b == r.b, "Queries of ", r.b, " sequences, keys of ", part.b, ". Both must be the same.");
  require(part.h == r.h && hq == r.g * r.h, hq, " query heads over ", part.h,
          " KV heads. They must be a multiple of them, of all parts alike.");
  require(part.d == r.d, "Queries of head_dim ", r.d, ", keys of ", part.d, ". Both must be the same.");
}

void check_part(const HeldPart& part, const Request& r, int hq) {
  check_heads(part, r, hq);
  for (size_t i = 0; part.causal && i < part.rows.size(); i++)
    require(part.rows[i].length >= r.n, "Row ", i, " (sequence x KV head): length ", part.rows[i].length, " with ", r.n,
            " causal queries. Allowed: as many tokens as queries, or more.");
}

// A request without its parts.
Request request(const Values& q, const Written& out, int h, float scale, bool exact) {
  const int hq = int(q.shape(1)), d = int(q.shape(3));
  require(d >= 8 && d <= MAX_HEAD_DIM && d % 8 == 0, "head_dim ", d, ". Allowed: a multiple of 8 up to ", MAX_HEAD_DIM,
          ".");
  for (int i = 0; i < 4; i++) require(out.shape(i) == q.shape(i), "out ", shape(out), " must be as q ", shape(q), ".");
  const int b = int(q.shape(0)), n = int(q.shape(2));
  return {{}, strided(q, "queries"), strided(out, "out"), nullptr, b, h, h ? hq / h : 0, n, d, scale, exact};
}

void attend_parts(Values q, const std::vector<const HeldPart*>& parts, float scale, bool exact, const std::string& isa,
                  int threads, Written out, std::optional<Lse> lse) {
  require(!parts.empty(), "No parts to attend to. Give at least one.");
  Request r = request(q, out, parts[0]->h, scale, exact);
  for (int i = 0; lse && i < 3; i++)
    require(lse->shape(i) == q.shape(i), "lse ", shape(*lse), " must be as q ", shape(q), " without channels.");
  r.lse = lse ? lse->data() : nullptr;
  for (const HeldPart* part : parts) {
    check_part(*part, r, int(q.shape(1)));
    r.parts.push_back(part);
  }
  const Kernels& kernels = choose(isa);
  const EncodeKernels& rows = encode_kernels(isa);
  nb::gil_scoped_release release;
  attend(r, kernels, rows, threads);
}

// Room for new tokens of a layer, the same number in every row.
struct Tail : HeldPart {
  int room;
};

Tail* new_tail(Written k, Written v) {
  auto rows = dense_rows(Values(k), Values(v));
  auto tail = std::make_unique<Tail>();
  static_cast<HeldPart&>(*tail) = *rows;
  tail->causal = true, tail->room = int(k.shape(2));
  for (Tokens& t : tail->rows) t.causal = true;
  return tail.release();
}

// Whether x is (b, h, n, d) of the tail's type with contiguous channels, and finite.
bool takes(const Tail& tail, const Values& x, const Side& side, int n) {
  const bool fits = int(x.shape(0)) == tail.b && int(x.shape(1)) == tail.h && int(x.shape(2)) == n &&
                    int(x.shape(3)) == tail.d;
  if (!fits || (tail.d > 1 && x.stride(3) != 1) || kind_of(x, "Tokens") != side.values.kind) return false;
  const Strided rows = strided(x, "tokens");
  for (int i = 0; i < tail.b; i++)
    for (int j = 0; j < tail.h; j++)
      for (int t = 0; t < n; t++)
        if (!all_finite(rows.row(i, j, t), rows.kind, tail.d)) return false;
  return true;
}

void write(const Tail& tail, const Values& x, bool keys, int at, int n) {
  const Strided rows = strided(x, "tokens");
  const size_t bytes = size_t(tail.d) * (rows.kind == Kind::fp32 ? 4 : 2);
  for (int i = 0; i < tail.b * tail.h; i++) {
    const Tokens& to = tail.rows[size_t(i)];
    auto* start = const_cast<uint8_t*>(keys ? to.k : to.v);
    for (int t = 0; t < n; t++)
      std::memcpy(start + (at + t) * (keys ? to.k_stride : to.v_stride), rows.row(i / tail.h, i % tail.h, t), bytes);
  }
}

// Writes new tokens behind the first `count` of the tail, and attends to all parts and causally to the tail. False, and
// nothing is written, if the tokens are not finite or not like the tail's.
bool step(Values q, Values k, Values v, const std::vector<const HeldPart*>& parts, const Tail& tail, int count,
          float scale, bool exact, const std::string& isa, int threads, Written out) {
  Request r = request(q, out, tail.h, scale, exact);
  Part rows = tail;
  require(count >= 0 && count <= tail.room - r.n, "Tokens ", count, " to ", count + r.n, " of a tail with room for ",
          tail.room, ".");
  for (Tokens& t : rows.rows) t.length = t.last = count + r.n;
  for (const HeldPart* part : parts) {
    check_part(*part, r, int(q.shape(1)));
    r.parts.push_back(part);
  }
  check_heads(rows, r, int(q.shape(1)));
  r.parts.push_back(&rows);
  const Kernels& kernels = choose(isa);
  const EncodeKernels& convert = encode_kernels(isa);
  if (!takes(tail, k, tail.k, r.n) || !takes(tail, v, tail.v, r.n)) return false;
  write(tail, k, true, count, r.n);
  write(tail, v, false, count, r.n);
  nb::gil_scoped_release release;
  attend(r, kernels, convert, threads);
  return true;
}

void merge_parts(const std::vector<Floats4>& outs, const std::vector<Lse>& lses) {
  require(!outs.empty() && outs.size() == lses.size(), outs.size(), " outputs and ", lses.size(),
          " log-sum-exps. Allowed: as many of each, at least one.");
  std::vector<float*> o, l;
  for (size_t i = 0; i < outs.size(); i++) {
    bool same = true;
    for (int j = 0; j < 4; j++) same = same && outs[i].shape(j) == outs[0].shape(j);
    for (int j = 0; j < 3; j++) same = same && lses[i].shape(j) == outs[0].shape(j);
    require(same, "Part ", i, " is ", shape(outs[i]), " and ", shape(lses[i]), ", part 0 is ", shape(outs[0]),
            ". All must have one shape.");
    o.push_back(outs[i].data()), l.push_back(lses[i].data());
  }
  merge(o.data(), l.data(), int(outs.size()), int64_t(lses[0].size()), int(outs[0].shape(3)));
}

}  // namespace

void bind_attention(nb::module_& m) {
  nb::class_<Side>(m, "Side").def(nb::new_(&new_side), "bits"_a, "d"_a, "start"_a, "bytes"_a,
                              "codes"_a, "planes"_a, "table"_a, "half"_a, "channels_first"_a);
  m.def("books_side", &new_books_side, "d"_a, "start"_a, "bytes"_a, "codes"_a, "planes"_a, "index"_a, "stages"_a,
        nb::rv_policy::take_ownership);
  nb::class_<HeldPart>(m, "Part");
  m.def("pages_part", &pages_part, "pool"_a.noconvert(), "table"_a.noconvert(), "lengths"_a.noconvert(), "k"_a, "v"_a,
        "before"_a.noconvert().none(), "after"_a.noconvert().none(), nb::rv_policy::take_ownership);
  m.def("dense_part", &dense_part, "k"_a.noconvert(), "v"_a.noconvert(), "lengths"_a.noconvert(),
        "padding"_a.noconvert().none(), "causal"_a, nb::rv_policy::take_ownership);
  m.def("attend", &attend_parts, "q"_a.noconvert(), "parts"_a, "scale"_a, "exact"_a, "isa"_a, "threads"_a,
        "out"_a.noconvert(), "lse"_a.noconvert().none());
  nb::class_<Tail>(m, "Tail").def(nb::new_(&new_tail), "k"_a.noconvert(), "v"_a.noconvert());
  m.def("step", &step, "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(), "parts"_a, "tail"_a, "count"_a,
        "scale"_a, "exact"_a, "isa"_a, "threads"_a, "out"_a.noconvert());
  m.def("merge", &merge_parts, "outs"_a, "lses"_a);
}

}  // namespace tersekv
