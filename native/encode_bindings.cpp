// Encoders and their arrays from Python. Everything that an index could go wrong on is checked here, before any read.
#include "encode_bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>

#include "arrays.h"
#include "encode.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tersekv {

namespace {

using Values = nb::ndarray<nb::ro, nb::device::cpu>;
using Blocks = nb::ndarray<const uint8_t, nb::device::cpu>;
using Pages = nb::ndarray<uint8_t, nb::device::cpu>;
using Codes = std::tuple<int, int, std::string, int, int>;         // d, bits, order, offset, bytes of a block
using PlaneArgs = std::tuple<std::string, std::string, int, int>;  // name, kind, offset, offset of the step or -1

template <class T>
T named(const std::string& name, std::initializer_list<std::pair<const char*, T>> all, const char* what) {
  for (const auto& [text, value] : all)
    if (name == text) return value;
  std::string names;
  for (const auto& one : all) names += (names.empty() ? "" : ", ") + std::string(one.first);
  require(false, "Unknown ", what, " \"", name, "\". Allowed: ", names, ".");
  return all.begin()->second;
}

Order order_of(const std::string& name) {
  return named<Order>(name, {{"linear", Order::linear}, {"simd_k", Order::simd_k}, {"simd_v", Order::simd_v},
                              {"trellis_k", Order::trellis_k}, {"trellis_v", Order::trellis_v}},
                      "storage order");
}

int width_of(Kind kind) { return kind == Kind::fp32 ? 4 : kind == Kind::fp16 || kind == Kind::bf16 ? 2 : 1; }

void check_order(Order order, int d, int bits) {
  require(!in_words(order) || (d % 32 == 0 && bits < 8), "head_dim ", d, ", ", bits,
          " bits: the trellis orders take multiples of 32, 1 to 4 bits.");
}

void check_head_dim(int d) {
  require(d >= 16 && d <= MAX_HEAD_DIM && d % 16 == 0, "head_dim ", d, ": the encoders take multiples of 16 up to ",
          MAX_HEAD_DIM, ". Use codec.encode.");
}

void check_codes(int d, int bits, int codes, int nbytes) {
  check_head_dim(d);
  require(bits == 1 || bits == 2 || bits == 3 || bits == 4 || bits == 8, "Codes of ", bits,
          " bits: the encoders pack 1, 2, 3, 4 and 8. Use codec.encode.");
  require(codes >= 0 && codes + d * BLOCK / 8 * bits <= nbytes, "The codes do not fit the block.");
}

Kind kind_named(const std::string& name) {
  return named<Kind>(name, {{"fp32", Kind::fp32}, {"fp16", Kind::fp16}, {"bf16", Kind::bf16}, {"log8", Kind::log8},
                            {"int8", Kind::int8}},
                     "kind of plane");
}

Plane& plane_named(Encoder& e, const std::string& name) {
  return *named<Plane*>(name, {{"values", &e.values}, {"scale", &e.scale}, {"zero", &e.zero},
                               {"channel_scale", &e.channel_scale}, {"channel_zero", &e.channel_zero}},
                        "plane");
}

// The planes of a block; `count` numbers of each must fit it.
Encoder base(Method method, const Codes& codes, const std::vector<PlaneArgs>& planes) {
  Encoder e;
  std::string order;
  std::tie(e.d, e.bits, order, e.codes, e.nbytes) = codes;
  e.method = method, e.order = order_of(order);
  check_order(e.order, e.d, e.bits);
  check_codes(e.d, method == Method::dense ? 1 : e.bits, e.codes, e.nbytes);
  for (const auto& [name, kind, offset, step] : planes) {
    const Plane plane = plane_named(e, name) = {kind_named(kind), offset, step};
    const int count = name == "values" ? BLOCK * e.d : name == "scale" || name == "zero" ? BLOCK : e.d;
    require(offset >= 0 && offset + count * width_of(plane.kind) <= e.nbytes, "A plane does not fit the block.");
    require((plane.kind == Kind::int8) == (step >= 0 && step + 2 <= e.nbytes),
            "int8 planes, and only they, have a step.");
  }
  return e;
}

// The scale of a token, the rotation and the mean that go before its codes.
void set_scale(Encoder& e, bool unbiased, float factor, const std::vector<float>& signs,
               const std::vector<float>& log8_edges, float log8_floor) {
  require(signs.empty() || int(signs.size()) == e.d, "The rotation needs a sign for each channel.");
  require(log8_edges.size() == 254 && e.scale, "A plane `scale`, and 254 edges of its logarithms.");
  require(!e.channel_zero || e.channel_zero.kind == Kind::int8, "The mean is stored as int8.");
  std::copy(signs.begin(), signs.end(), e.signs);
  e.rotated = !signs.empty(), e.unbiased = unbiased, e.factor = factor, e.root_d = float(std::sqrt(double(e.d)));
  set_log8(e.log8, log8_edges, log8_floor);
}

// `first`: where the table begins among the entries.
void set_table(Encoder& e, const std::vector<float>& thresholds, const std::vector<float>& centroids, size_t first) {
  const size_t half = size_t(1) << (e.bits - 1);
  require(thresholds.size() == half - 1 && centroids.size() == 2 * half, "The table needs an entry for each code.");
  const auto usable = [](float x) { return x > 1e-30f && x < INFINITY; };  // so that bins can be counted
  require(std::is_sorted(thresholds.begin(), thresholds.end()) &&
              std::all_of(thresholds.begin(), thresholds.end(), usable),
          "Thresholds must be positive and ascend.");
  std::fill(e.thresholds, e.thresholds + 256, INFINITY);
  std::copy(thresholds.begin(), thresholds.end(), e.thresholds);
  std::fill(e.centroids, e.centroids + 256, 0.f);
  std::copy(centroids.begin(), centroids.end(), e.centroids + first);
  set_bins(e);
}

Encoder* table_encoder(const Codes& codes, const std::vector<PlaneArgs>& planes, const std::vector<float>& thresholds,
                       const std::vector<float>& centroids, bool unbiased, float factor,
                       const std::vector<float>& signs, const std::vector<float>& log8_edges, float log8_floor) {
  Encoder e = base(Method::table, codes, planes);
  set_scale(e, unbiased, factor, signs, log8_edges, log8_floor);
  set_table(e, thresholds, centroids, 0);
  return new Encoder(e);
}

// `odd`: of the states 0..127; the others negate them. `half`: of what they are multiples.
Encoder* trellis_encoder(const Codes& codes, const std::vector<PlaneArgs>& planes, const std::vector<int>& odd,
                         float half, bool unbiased, float factor, const std::vector<float>& signs,
                         const std::vector<float>& log8_edges, float log8_floor) {
  Encoder e = base(Method::trellis, codes, planes);
  require(e.bits <= 4 && odd.size() == 128 && half > 0, "A trellis has 1 to 4 bits, an entry for each of 128 states.");
  set_scale(e, unbiased, factor, signs, log8_edges, log8_floor);
  e.per_unit = 2 / half;
  require(std::ldexp(e.per_unit * e.root_d, e.bits) < 32000, "Entries in steps of ", half, " are too fine at head_dim ",
          e.d, ".");
  for (int i = 0; i < 256; i++) {
    const int entry = i < 128 ? odd[size_t(i)] : -odd[size_t(i - 128)];
    require(entry >= -127 && entry <= 127, "Entry ", i, " of the trellis is ", entry, ". Allowed: -127 to 127.");
    e.odd[i] = int16_t(entry), e.centroids[i] = float(entry) * half;
  }
  return new Encoder(e);
}

Encoder* uniform_encoder(const Codes& codes, const std::vector<PlaneArgs>& planes, bool symmetric) {
  Encoder e = base(Method::uniform, codes, planes);
  const Plane &scale = e.channel_scale ? e.channel_scale : e.scale, &zero = e.channel_scale ? e.channel_zero : e.zero;
  require(e.bits > 1 && scale.kind == Kind::fp16 && (symmetric || zero.kind == Kind::fp16),
          "Scale and zero are stored as fp16.");
  const int top = (1 << (e.bits - symmetric)) - 1;
  e.symmetric = symmetric, e.low = symmetric ? -top - 1 : 0, e.high = top, e.inverse_top = float(1.0 / top);
  return new Encoder(e);
}

Encoder* dense_encoder(const Codes& codes, const std::vector<PlaneArgs>& planes) {
  const Encoder e = base(Method::dense, codes, planes);
  require(e.values && width_of(e.values.kind) > 1, "A plane `values` of fp32, fp16 or bf16.");
  return new Encoder(e);
}

// Calls visit(start of a block, in bytes from the array's) for every index of the leading dims, the last one fastest.
template <class Array, class Visit>
void each_block(const Array& x, size_t inner, Visit visit) {
  const size_t dims = x.ndim() - inner;
  std::vector<size_t> at(dims, 0);
  int64_t count = 1;
  for (size_t i = 0; i < dims; i++) count *= int64_t(x.shape(i));
  for (int64_t n = 0; n < count; n++) {
    int64_t start = 0;
    for (size_t i = 0; i < dims; i++) start += int64_t(at[i]) * x.stride(i);
    visit(start * int64_t(x.itemsize()));
    for (size_t i = dims; i-- > 0 && ++at[i] == x.shape(i);) at[i] = 0;
  }
}

template <class A, class B>
void same_lead(const A& a, size_t inner, const B& b) {
  bool same = a.ndim() >= inner && b.ndim() == a.ndim() - inner + 1;
  for (size_t i = 0; same && i + inner < a.ndim(); i++) same = a.shape(i) == b.shape(i);
  require(same, "Blocks and output must have the same leading dims: one output block for each.");
}

template <class Array>
void check_row(const Array& x, int64_t length) {
  require(int64_t(x.shape(x.ndim() - 1)) == length && (length < 2 || x.stride(x.ndim() - 1) == 1),
          "The last dim has ", x.shape(x.ndim() - 1), " elements; a block needs ", length, ", contiguous ones.");
}

std::vector<uint8_t*> pages_of(const Pages& out, int nbytes) {
  check_row(out, nbytes);
  std::vector<uint8_t*> pages;
  each_block(out, 1, [&](int64_t start) { pages.push_back(out.data() + start); });
  return pages;
}

void encode_blocks(const Encoder& e, Values x, Pages out, const std::string& isa, int threads) {
  same_lead(x, 2, out);
  const size_t tokens = x.ndim() - 2;  // the dim
  require(x.shape(tokens) == BLOCK, "Blocks of ", x.shape(tokens), " tokens: the encoders take ", BLOCK, ".");
  check_row(x, e.d);
  const std::vector<uint8_t*> pages = pages_of(out, e.nbytes);
  const Kind kind = kind_of(x, "Values to encode");
  std::vector<Input> blocks;
  each_block(x, 2, [&](int64_t start) {
    blocks.push_back({static_cast<const uint8_t*>(x.data()) + start, x.stride(tokens) * int64_t(x.itemsize()), kind});
  });
  const EncodeKernels& kernels = encode_kernels(isa);
  nb::gil_scoped_release release;
  encode(e, blocks, pages, kernels, threads);
}

void repack_blocks(Blocks blocks, const Codes& codes, const std::string& order, Pages out, const std::string& isa,
                   int threads) {
  const auto& [d, bits, from, offset, nbytes] = codes;
  check_codes(d, bits, offset, nbytes);
  same_lead(blocks, 1, out);
  check_row(blocks, nbytes);
  const std::vector<uint8_t*> pages = pages_of(out, nbytes);
  std::vector<const uint8_t*> sources;
  each_block(blocks, 1, [&](int64_t start) { sources.push_back(blocks.data() + start); });
  const Repacking how{bits, d, nbytes, offset, order_of(from), order_of(order)};
  check_order(how.from, d, bits);
  check_order(how.to, d, bits);
  const EncodeKernels& kernels = encode_kernels(isa);
  nb::gil_scoped_release release;
  repack(how, sources, pages, kernels, threads);
}

// Codes of each block by the table, its errors passed on by the matrix that has the same place among the leading dims.
void steer_blocks(Values z, Values passed, const std::vector<float>& thresholds, const std::vector<float>& centroids,
                  Pages out, const std::string& isa, int threads) {
  require(z.ndim() >= 2 && passed.ndim() == z.ndim() && out.ndim() == z.ndim(),
          "Values, matrices and codes need as many dims.");
  const size_t tokens = z.ndim() - 2, channels = z.ndim() - 1;
  const int d = int(z.shape(channels));
  check_head_dim(d);
  require(z.shape(tokens) == BLOCK, "Blocks of ", z.shape(tokens), " tokens: the encoders take ", BLOCK, ".");
  for (size_t i = 0; i < z.ndim(); i++)
    require(z.shape(i) == out.shape(i) && passed.shape(i) == (i == tokens ? size_t(d) : z.shape(i)), "Dim ", i,
            ": values have ", z.shape(i), ", matrices ", passed.shape(i), ", codes ", out.shape(i),
            ". Allowed: (*lead, ", BLOCK, ", d), (*lead, d, d), (*lead, ", BLOCK, ", d).");
  require(kind_of(z, "Values") == Kind::fp32 && kind_of(passed, "Factors") == Kind::fp32,
          "Values and matrices must be fp32.");
  check_row(z, d), check_row(passed, d), check_row(out, d);
  require(passed.stride(tokens) == d && out.stride(tokens) == d,
          "The rows of a matrix, or of codes, must be neighbours.");
  Encoder e;
  const size_t half = centroids.size() / 2;
  for (e.d = d, e.bits = 1; size_t(1) << (e.bits - 1) < half && e.bits < 8;) e.bits++;
  set_table(e, thresholds, centroids, e.bits > 4 ? 128 - half : 0);
  std::vector<Input> blocks;
  std::vector<const float*> matrices;
  std::vector<uint8_t*> codes;
  const auto* from = static_cast<const uint8_t*>(z.data());
  each_block(z, 2, [&](int64_t at) { blocks.push_back({from + at, z.stride(tokens) * 4, Kind::fp32}); });
  each_block(passed, 2, [&](int64_t at) { matrices.push_back(static_cast<const float*>(passed.data()) + at / 4); });
  each_block(out, 2, [&](int64_t at) { codes.push_back(out.data() + at); });
  const EncodeKernels& kernels = encode_kernels(isa);
  nb::gil_scoped_release release;
  steer(e, blocks, matrices, codes, kernels, threads);
}

using Rows = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using ReadRows = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Signs = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void rotate_rows(ReadRows x, Signs signs, bool back, Rows out, const std::string& isa, int threads) {
  const int d = int(signs.shape(0));
  require(d >= 16 && d % 16 == 0, "head_dim ", d, ": the rotation takes multiples of 16.");
  require(x.ndim() > 0 && int(x.shape(x.ndim() - 1)) == d && x.size() == out.size(),
          "The rows must have an element for each of ", d, " signs, and the output as many as the input.");
  const float *before = back ? nullptr : signs.data(), *after = back ? signs.data() : nullptr;
  rotate(x.data(), int64_t(x.size()) / d, d, before, after, out.data(), encode_kernels(isa), threads);
}

}  // namespace

void bind_encoding(nb::module_& m) {
  nb::class_<Encoder>(m, "Encoder");
  m.def("table_encoder", &table_encoder, "codes"_a, "planes"_a, "thresholds"_a, "centroids"_a, "unbiased"_a, "factor"_a,
        "signs"_a, "log8_edges"_a, "log8_floor"_a, nb::rv_policy::take_ownership);
  m.def("trellis_encoder", &trellis_encoder, "codes"_a, "planes"_a, "odd"_a, "half"_a, "unbiased"_a, "factor"_a,
        "signs"_a, "log8_edges"_a, "log8_floor"_a, nb::rv_policy::take_ownership);
  m.def("uniform_encoder", &uniform_encoder, "codes"_a, "planes"_a, "symmetric"_a, nb::rv_policy::take_ownership);
  m.def("dense_encoder", &dense_encoder, "codes"_a, "planes"_a, nb::rv_policy::take_ownership);
  m.def("encode", &encode_blocks, "encoder"_a, "x"_a.noconvert(), "out"_a.noconvert(), "isa"_a, "threads"_a);
  m.def("repack", &repack_blocks, "blocks"_a.noconvert(), "codes"_a, "order"_a, "out"_a.noconvert(), "isa"_a,
        "threads"_a);
  m.def("steer", &steer_blocks, "z"_a.noconvert(), "passed"_a.noconvert(), "thresholds"_a, "centroids"_a,
        "out"_a.noconvert(), "isa"_a, "threads"_a);
  m.def("rotate", &rotate_rows, "x"_a.noconvert(), "signs"_a.noconvert(), "back"_a, "out"_a.noconvert(), "isa"_a,
        "threads"_a);
}

}  // namespace tersekv
