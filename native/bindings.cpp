// Arrays from Python to requests. Everything that an index could go wrong on is checked here, before any read.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <stdexcept>

#include "attend.h"
#include "bandwidth.h"
#include "isas.h"

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

void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument(what);
}

Kind kind_of(const std::string& name) {
  for (auto [text, kind] : {std::pair{"fp32", Kind::fp32}, {"fp16", Kind::fp16}, {"bf16", Kind::bf16},
                            {"log8", Kind::log8}, {"int8", Kind::int8}})
    if (name == text) return kind;
  throw std::invalid_argument("Unknown kind of plane \"" + name + "\".");
}

using PlaneArgs = std::tuple<std::string, std::string, int, int>;  // name, kind, offset, offset of the step or -1

void set_plane(Side& side, const PlaneArgs& args) {
  const auto& [name, kind, offset, step] = args;
  const Plane plane{kind_of(kind), offset, step};
  if (name == "values") side.values = plane;
  else if (name == "scale") side.scale = plane;
  else if (name == "zero") side.zero = plane;
  else if (name == "channel_scale") side.channel_scale = plane;
  else if (name == "channel_zero") side.channel_zero = plane;
  else throw std::invalid_argument("Unknown plane \"" + name + "\".");
}

// Levels 0..127 that come nearest to the table: what the int8 path looks up.
void set_levels(Side& side, const std::vector<float>& table) {
  float low = INFINITY, high = -INFINITY;
  for (size_t i = 0; i < table.size(); i++) {
    side.table[i] = table[i];
    low = std::fmin(low, table[i]), high = std::fmax(high, table[i]);
  }
  side.low = low, side.step = high > low ? (high - low) / 127 : 1;
  for (int i = 0; i < 64; i++) {
    const float x = table[i % table.size()];
    side.levels[i] = uint8_t(std::lround((x - low) / side.step));
  }
}

Side* make_side(int bits, int start, int codes, const std::vector<PlaneArgs>& planes, const std::vector<float>& table) {
  require(bits == 0 || bits == 1 || bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits: 1, 2, 3, 4, 8, or 0 for dense.");
  require(bits == 0 || int(table.size()) == 1 << bits, "The table needs an entry for each code.");
  Side* side = new Side;
  side->bits = bits, side->start = start, side->codes = codes;
  for (const PlaneArgs& plane : planes) set_plane(*side, plane);
  if (bits) set_levels(*side, table);
  return side;
}

struct Sizes {
  int b, h, g, n, d;
};

Sizes sizes_of(const ReadQueries& q, const Queries3& out, const Lse& lse, int b, int h) {
  const Sizes s{b, h, h ? int(q.shape(1)) / h : 0, int(q.shape(2)), int(q.shape(3))};
  require(int(q.shape(0)) == b && h > 0 && int(q.shape(1)) == s.g * h, "Query heads must be a multiple of the KV heads.");
  require(s.d >= 8 && s.d <= MAX_HEAD_DIM && s.d % 8 == 0, "head_dim: a multiple of 8 up to 512.");
  for (int i = 0; i < 4; i++) require(out.shape(i) == q.shape(i), "`out` must have the shape of `q`.");
  for (int i = 0; i < 3; i++) require(lse.shape(i) == q.shape(i), "`lse` must have the shape of `q` without channels.");
  return s;
}

Attention request(const Side& k, const Side& v, const ReadQueries& q, const Queries3& out, const Lse& lse, Sizes s,
                  float scale, bool exact) {
  return {&k, &v, std::vector<Tokens>(size_t(s.b) * s.h), q.data(), out.data(), lse.data(), s.g * s.n, s.d, s.n,
          scale, exact};
}

void attend_pages(ReadQueries q, Pool8 pool, Table32 table, Lengths64 lengths, const Side& k, const Side& v, float scale,
                  bool exact, const std::string& isa, int threads, Queries3 out, Lse lse) {
  const Sizes s = sizes_of(q, out, lse, int(table.shape(0)), int(table.shape(1)));
  require(s.d % 16 == 0 || (!k.bits && !v.bits), "head_dim: packed codes need a multiple of 16.");
  require(lengths.shape(0) == table.shape(0) && lengths.shape(1) == table.shape(1), "`lengths` must be (b, h).");
  Attention a = request(k, v, q, out, lse, s, scale, exact);
  const int64_t pages = int64_t(pool.shape(0)), blocks = int64_t(table.shape(2));
  for (size_t i = 0; i < a.tokens.size(); i++) {
    Tokens& t = a.tokens[i];
    t.pool = pool.data(), t.page_bytes = int64_t(pool.shape(1)), t.table = table.data() + i * blocks;
    t.length = t.last = lengths.data()[i];
    require(t.length >= 0 && t.length <= blocks * BLOCK, "A length lies outside its page table.");
    for (int64_t j = 0; j * BLOCK < t.length; j++)
      require(t.table[j] >= 0 && t.table[j] < pages, "A page table names a page that the pool does not have.");
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
  require(type.code == uint8_t(nb::dlpack::dtype_code::Bfloat) && type.bits == 16, "Dense keys and values: fp32, fp16 or bf16.");
  return Kind::bf16;
}

// Bytes between tokens; `row`: where (i, j) starts.
struct Rows {
  const uint8_t* data;
  int64_t batch, head, token;
  explicit Rows(const Dense& x) : data(static_cast<const uint8_t*>(x.data())) {
    const int64_t size = x.itemsize();
    require(x.shape(2) < 1 || x.shape(3) < 2 || x.stride(3) == 1, "Channels of dense keys and values must be contiguous.");
    batch = x.stride(0) * size, head = x.stride(1) * size, token = x.stride(2) * size;
  }
  const uint8_t* row(int i, int j) const { return data + i * batch + j * head; }
};

void attend_dense(ReadQueries q, Dense k, Dense v, Lengths64 lengths, Padding64 padding, bool causal, float scale,
                  const std::string& isa, int threads, Queries3 out, Lse lse) {
  const Sizes s = sizes_of(q, out, lse, int(k.shape(0)), int(k.shape(1)));
  for (int i = 0; i < 4; i++) require(k.shape(i) == v.shape(i), "Keys and values must have one shape.");
  require(int(k.shape(3)) == s.d, "Keys must have the head_dim of the queries.");
  require(int(lengths.shape(0)) == s.b && int(lengths.shape(1)) == s.h, "`lengths` must be (b, h).");
  require(int(padding.shape(0)) == s.b, "`padding` must be (b).");
  Side ks, vs;
  ks.values.kind = kind_of(k), vs.values.kind = kind_of(v);
  const Rows kr(k), vr(v);
  Attention a = request(ks, vs, q, out, lse, s, scale, true);
  for (int i = 0; i < s.b; i++)
    for (int j = 0; j < s.h; j++) {
      Tokens& t = a.tokens[size_t(i) * s.h + j];
      t.k = kr.row(i, j), t.v = vr.row(i, j), t.k_stride = kr.token, t.v_stride = vr.token;
      t.first = padding.data()[i], t.length = t.last = lengths.data()[size_t(i) * s.h + j], t.causal = causal;
      require(t.length >= 0 && t.length <= int64_t(k.shape(2)), "A length lies outside its keys.");
      require(t.first >= 0 && (!causal || t.length >= s.n), "padding must not be negative, nor causal lengths below n.");
    }
  const Kernels& kernels = choose(isa);
  nb::gil_scoped_release release;
  attend(a, kernels, threads);
}

void merge_parts(const std::vector<Queries3>& outs, const std::vector<Lse>& lses) {
  require(!outs.empty() && outs.size() == lses.size(), "As many outputs as log-sum-exps, at least one.");
  std::vector<float*> o, l;
  for (size_t i = 0; i < outs.size(); i++) {
    for (int j = 0; j < 4; j++) require(outs[i].shape(j) == outs[0].shape(j), "Parts must have one shape.");
    for (int j = 0; j < 3; j++) require(lses[i].shape(j) == outs[0].shape(j), "Parts must have one shape.");
    o.push_back(outs[i].data()), l.push_back(lses[i].data());
  }
  merge(o.data(), l.data(), int(outs.size()), int64_t(lses[0].size()), int(outs[0].shape(3)));
}

uint64_t read_memory(Bytes data, int streams, int threads) {
  require(streams >= 1 && threads >= 1, "streams, threads: 1 or more.");
  nb::gil_scoped_release release;
  return read_all(data.data(), int64_t(data.size()), streams, threads);
}

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
  nb::class_<Side>(m, "Side").def(nb::new_(&make_side), "bits"_a, "start"_a, "codes"_a, "planes"_a, "table"_a);
  m.def("attend_pages", &attend_pages, "q"_a.noconvert(), "pool"_a.noconvert(), "table"_a.noconvert(),
        "lengths"_a.noconvert(), "k"_a, "v"_a, "scale"_a, "exact"_a, "isa"_a, "threads"_a, "out"_a.noconvert(),
        "lse"_a.noconvert());
  m.def("attend_dense", &attend_dense, "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(), "lengths"_a.noconvert(),
        "padding"_a.noconvert(), "causal"_a, "scale"_a, "isa"_a, "threads"_a, "out"_a.noconvert(), "lse"_a.noconvert());
  m.def("merge", &merge_parts, "outs"_a, "lses"_a);
  m.def("read_memory", &read_memory, "data"_a.noconvert(), "streams"_a, "threads"_a, "Parity of all bytes.");
  m.def("isas", &isas, "Names, whether each runs here, and what it needs; best first.");
}
