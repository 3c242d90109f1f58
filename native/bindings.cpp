// Arrays from Python to requests. Everything that an index could go wrong on is checked here, before any read.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "attend.h"
#include "bandwidth.h"
#include "encode_bindings.h"
#include "isas.h"
#include "memory.h"
#include "require.h"
#include "side.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tersekv {

namespace {

using Queries3 = nb::ndarray<float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using ReadQueries = nb::ndarray<const float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Lse = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Pool8 = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Table32 = nb::ndarray<const int32_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Lengths64 = nb::ndarray<const int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Padding64 = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Dense = nb::ndarray<nb::ro, nb::ndim<4>, nb::device::cpu>;

template <class Array>
std::string shape(const Array& x) {
  std::string text = "(";
  for (size_t i = 0; i < x.ndim(); i++) text += (i ? ", " : "") + std::to_string(x.shape(i));
  return text + ")";
}

Side* new_side(int bits, int d, int start, int bytes, int codes, const std::vector<PlaneArgs>& planes,
               const std::vector<float>& table) {
  return new Side(make_side(bits, d, start, bytes, codes, planes, table));
}

struct Sizes {
  int b, h, g, n, d;
};

Sizes sizes_of(const ReadQueries& q, const Queries3& out, const Lse& lse, int b, int h) {
  const int hq = int(q.shape(1)), d = int(q.shape(3));
  const Sizes s{b, h, h ? hq / h : 0, int(q.shape(2)), d};
  require(int(q.shape(0)) == b, "Queries of ", q.shape(0), " sequences, keys of ", b, ". Both must be the same.");
  require(h > 0 && hq == s.g * h, hq, " query heads over ", h, " KV heads. They must be a multiple of them.");
  require(d >= 8 && d <= MAX_HEAD_DIM && d % 8 == 0, "head_dim ", d, ". Allowed: a multiple of 8 up to ",
          MAX_HEAD_DIM, ".");
  for (int i = 0; i < 4; i++) require(out.shape(i) == q.shape(i), "out ", shape(out), " must be as q ", shape(q), ".");
  for (int i = 0; i < 3; i++)
    require(lse.shape(i) == q.shape(i), "lse ", shape(lse), " must be as q ", shape(q), " without channels.");
  return s;
}

Attention request(const Side& k, const Side& v, const ReadQueries& q, const Queries3& out, const Lse& lse, Sizes s,
                  float scale, bool exact) {
  return {&k, &v, std::vector<Tokens>(size_t(s.b) * s.h), q.data(), out.data(), lse.data(), s.g * s.n, s.d, s.n,
          scale, exact};
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

void attend_pages(ReadQueries q, Pool8 pool, Table32 table, Lengths64 lengths, const Side& k, const Side& v,
                  float scale, bool exact, const std::string& isa, int threads, Queries3 out, Lse lse) {
  const Sizes s = sizes_of(q, out, lse, int(table.shape(0)), int(table.shape(1)));
  require(s.d == k.d && s.d == v.d, "Queries of head_dim ", s.d, ", keys of ", k.d, ", values of ", v.d,
          ". All must be the same.");
  const int64_t pages = int64_t(pool.shape(0)), bytes = int64_t(pool.shape(1)), blocks = int64_t(table.shape(2));
  require(k.start + k.bytes == v.start && v.start + v.bytes == bytes, "Pages of ", bytes,
          " bytes. Their layouts say ", k.bytes, " of keys and ", v.bytes, " of values.");
  require(lengths.shape(0) == table.shape(0) && lengths.shape(1) == table.shape(1), "lengths ", shape(lengths),
          " must be (b, h) of the page table ", shape(table), ".");
  Attention a = request(k, v, q, out, lse, s, scale, exact);
  for (size_t i = 0; i < a.tokens.size(); i++) {
    Tokens& t = a.tokens[i];
    t.pool = pool.data(), t.page_bytes = bytes, t.table = table.data() + i * blocks;
    t.length = t.last = lengths.data()[i];
    check_tokens(t, i, blocks, pages);
  }
  const Kernels& kernels = choose(isa);
  nb::gil_scoped_release release;
  attend(a, kernels, threads);
}

Kind kind_of(const Dense& x) {
  const nb::dlpack::dtype type = x.dtype();
  const bool real = type.code == uint8_t(nb::dlpack::dtype_code::Float);
  if (real && type.bits == 32) return Kind::fp32;
  if (real && type.bits == 16) return Kind::fp16;
  require(type.code == uint8_t(nb::dlpack::dtype_code::Bfloat) && type.bits == 16,
          "Dense keys or values of another type. Allowed: fp32, fp16 and bf16.");
  return Kind::bf16;
}

// Bytes between tokens; `row`: where (i, j) starts.
struct Rows {
  const uint8_t* data;
  int64_t batch, head, token;
  explicit Rows(const Dense& x) : data(static_cast<const uint8_t*>(x.data())) {
    const int64_t size = x.itemsize();
    require(x.shape(2) < 1 || x.shape(3) < 2 || x.stride(3) == 1, "Channels of keys or values ", shape(x),
            " lie ", x.stride(3), " elements apart. They must be contiguous: call .contiguous().");
    batch = x.stride(0) * size, head = x.stride(1) * size, token = x.stride(2) * size;
  }
  const uint8_t* row(int i, int j) const { return data + i * batch + j * head; }
};

void attend_dense(ReadQueries q, Dense k, Dense v, Lengths64 lengths, Padding64 padding, bool causal, float scale,
                  const std::string& isa, int threads, Queries3 out, Lse lse) {
  const Sizes s = sizes_of(q, out, lse, int(k.shape(0)), int(k.shape(1)));
  for (int i = 0; i < 4; i++)
    require(k.shape(i) == v.shape(i), "Keys ", shape(k), ", values ", shape(v), ". Both must have one shape.");
  require(int(k.shape(3)) == s.d, "Keys of head_dim ", k.shape(3), ", queries of ", s.d, ". Both must be the same.");
  require(int(lengths.shape(0)) == s.b && int(lengths.shape(1)) == s.h, "lengths ", shape(lengths),
          " must be (b, h) of the keys ", shape(k), ".");
  require(int(padding.shape(0)) == s.b, "padding ", shape(padding), " must be (b) of the keys ", shape(k), ".");
  Side ks, vs;
  ks.values.kind = kind_of(k), vs.values.kind = kind_of(v);
  const Rows kr(k), vr(v);
  Attention a = request(ks, vs, q, out, lse, s, scale, true);
  for (int i = 0; i < s.b; i++)
    for (int j = 0; j < s.h; j++) {
      Tokens& t = a.tokens[size_t(i) * s.h + j];
      t.k = kr.row(i, j), t.v = vr.row(i, j), t.k_stride = kr.token, t.v_stride = vr.token;
      t.first = padding.data()[i], t.length = t.last = lengths.data()[size_t(i) * s.h + j], t.causal = causal;
      require(t.length >= 0 && t.length <= int64_t(k.shape(2)), "Sequence ", i, ", KV head ", j, ": length ",
              t.length, ". Allowed: 0 to the ", k.shape(2), " tokens of its keys.");
      require(t.first >= 0, "Sequence ", i, ": padding ", t.first, ". Allowed: 0 and more.");
      require(!causal || t.length >= s.n, "Sequence ", i, ", KV head ", j, ": length ", t.length, " with ", s.n,
              " causal queries. Allowed: as many tokens as queries, or more.");
    }
  const Kernels& kernels = choose(isa);
  nb::gil_scoped_release release;
  attend(a, kernels, threads);
}

void merge_parts(const std::vector<Queries3>& outs, const std::vector<Lse>& lses) {
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

uint64_t read_memory(Bytes data, int streams, int threads) {
  require(streams >= 1 && threads >= 1, "streams, threads: 1 or more.");
  nb::gil_scoped_release release;
  return read_all(data.data(), int64_t(data.size()), streams, threads);
}

void large_pages(Pool8 pool) { prefer_large_pages(pool.data(), int64_t(pool.size())); }

std::vector<std::tuple<std::string, bool, std::string>> isas() {
  std::vector<std::tuple<std::string, bool, std::string>> all;
  for (const Choice& choice : choices()) all.emplace_back(choice.kernels->name, choice.runs, choice.why);
  return all;
}

}  // namespace

}  // namespace tersekv

NB_MODULE(_native, m) {
  using namespace tersekv;
  m.doc() = "Kernels of tersekv for processors. Call them through tersekv.ops.";
  nb::class_<Side>(m, "Side").def(nb::new_(&new_side), "bits"_a, "d"_a, "start"_a, "bytes"_a,
                              "codes"_a, "planes"_a, "table"_a);
  m.def("attend_pages", &attend_pages, "q"_a.noconvert(), "pool"_a.noconvert(), "table"_a.noconvert(),
        "lengths"_a.noconvert(), "k"_a, "v"_a, "scale"_a, "exact"_a, "isa"_a, "threads"_a, "out"_a.noconvert(),
        "lse"_a.noconvert());
  m.def("attend_dense", &attend_dense, "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(), "lengths"_a.noconvert(),
        "padding"_a.noconvert(), "causal"_a, "scale"_a, "isa"_a, "threads"_a, "out"_a.noconvert(), "lse"_a.noconvert());
  m.def("merge", &merge_parts, "outs"_a, "lses"_a);
  m.def("read_memory", &read_memory, "data"_a.noconvert(), "streams"_a, "threads"_a, "Parity of all bytes.");
  m.def("prefer_large_pages", &large_pages, "pool"_a.noconvert());
  bind_encoding(m);
  m.def("isas", &isas, "Names, whether each runs here, and what it needs; best first.");
}
