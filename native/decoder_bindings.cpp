// Decoder layers from Python. Everything that an index could go wrong on is checked here, before any read.
#include "decoder_bindings.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "arrays.h"
#include "decoder.h"
#include "isas.h"
#include "linear_bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tersekv {

namespace {

using Layers = std::vector<std::pair<Weights, std::optional<Bias>>>;
using Norms = std::vector<std::optional<Bias>>;

// A layer's weights, which live as long as it does.
class Decoder {
 public:
  Decoder(Layers layers, Norms norms, double eps, int d) : layers_(std::move(layers)), norms_(std::move(norms)) {
    require(layers_.size() == 7 && norms_.size() == 4, "Needed: seven linear layers and four norms.");
    require(d > 0 && d % LANES == 0, "Head dim ", d, ". Allowed: multiples of ", LANES, ".");
    layer_.kind = kind_of(layers_[0].first, "Weights"), layer_.eps = float(eps), layer_.d = d;
    Linear* const to[7] = {&layer_.q, &layer_.k, &layer_.v, &layer_.o, &layer_.gate, &layer_.up, &layer_.down};
    for (int i = 0; i < 7; i++) {
      *to[i] = layer_of(layers_[size_t(i)].first, layers_[size_t(i)].second);
      require(to[i]->kind == layer_.kind, "Weights of several types. Needed: one.");
    }
    check_sizes();
    layer_.input = weights_of(0, layer_.hidden()), layer_.post = weights_of(1, layer_.hidden());
    layer_.q_norm = weights_of(2, d), layer_.k_norm = weights_of(3, d);
    require(layer_.input && layer_.post, "Needed: a norm before attention and one after it.");
  }

  void project(Vectors x, Vectors cos, Vectors sin, Written y, const std::string& isa, int threads) const {
    const size_t vectors = rows_of(x, layer_.hidden(), "Inputs"), d = size_t(layer_.d);
    require(rows_of(cos, layer_.d, "Cosines") == vectors && rows_of(sin, layer_.d, "Sines") == vectors,
            "Cosines and sines ", shape(cos), ", ", shape(sin), ". Needed: (", vectors, ", ", d, ").");
    require(rows_of(y, layer_.heads() * layer_.d, "Outputs") == vectors, "Outputs ", shape(y), " for ", vectors,
            " tokens.");
    const Processor on{choose(isa), encode_kernels(isa), threads};
    auto* out = static_cast<uint8_t*>(y.data());
    nb::gil_scoped_release release;
    tersekv::project(layer_, bytes_of(x), bytes_of(cos), bytes_of(sin), int(vectors), out, on);
  }

  void finish(Vectors attended, Vectors x, Written y, const std::string& isa, int threads) const {
    const size_t vectors = rows_of(x, layer_.hidden(), "Inputs");
    require(rows_of(attended, layer_.o.in, "What was attended to") == vectors, "What was attended to ",
            shape(attended), " for ", vectors, " tokens.");
    require(rows_of(y, layer_.hidden(), "Outputs") == vectors, "Outputs ", shape(y), " for ", vectors, " tokens.");
    const Processor on{choose(isa), encode_kernels(isa), threads};
    auto* out = static_cast<uint8_t*>(y.data());
    nb::gil_scoped_release release;
    tersekv::finish(layer_, bytes_of(attended), bytes_of(x), int(vectors), out, on);
  }

 private:
  void check_sizes() const {
    const DecoderLayer& l = layer_;
    require(l.k.in == l.hidden() && l.v.in == l.hidden() && l.o.out == l.hidden() && l.gate.in == l.hidden() &&
                l.up.in == l.hidden() && l.down.out == l.hidden(),
            "Linear layers do not take or give vectors of ", l.hidden(), ".");
    require(l.o.in == l.q.out && l.k.out == l.v.out && l.gate.out == l.up.out && l.down.in == l.up.out,
            "Linear layers do not fit to each other.");
    require(l.q.out % l.d == 0 && l.k.out % l.d == 0, "Queries or keys are no whole heads of ", l.d, ".");
  }

  const uint8_t* weights_of(size_t norm, int count) const {
    const std::optional<Bias>& weights = norms_[norm];
    if (!weights) return nullptr;
    require(weights->size() == size_t(count) && kind_of(*weights, "A norm") == layer_.kind, "A norm's weights ",
            shape(*weights), ". Needed: ", count, ", of the other weights' type.");
    return bytes_of(*weights);
  }

  template <class Array>
  size_t rows_of(const Array& x, int count, const char* what) const {
    require(kind_of(x, what) == layer_.kind && x.size() % size_t(count) == 0, what, " ", shape(x),
            ". Needed: rows of ", count, " numbers, of the weights' type.");
    return x.size() / size_t(count);
  }

  Layers layers_;
  Norms norms_;
  DecoderLayer layer_{};
};

}  // namespace

void bind_decoder(nb::module_& m) {
  nb::class_<Decoder>(m, "DecoderLayer")
      .def(nb::init<Layers, Norms, double, int>(), "layers"_a, "norms"_a, "eps"_a, "d"_a)
      .def("project", &Decoder::project, "x"_a.noconvert(), "cos"_a.noconvert(), "sin"_a.noconvert(),
           "y"_a.noconvert(), "isa"_a, "threads"_a)
      .def("finish", &Decoder::finish, "attended"_a.noconvert(), "x"_a.noconvert(), "y"_a.noconvert(), "isa"_a,
           "threads"_a);
}

}  // namespace tersekv
