// Linear layers from Python. Everything that an index could go wrong on is checked here, before any read.
#include "linear_bindings.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <optional>

#include "arrays.h"
#include "isas.h"
#include "linear.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tersekv {

Linear layer_of(const Weights& weights, const std::optional<Bias>& bias) {
  const Kind kind = kind_of(weights, "Weights");
  const size_t out = weights.shape(0), in = weights.shape(1);
  require(in % LANES == 0 && in > 0 && std::max(in, out) < size_t(1) << 31, "Weights ", shape(weights),
          ". Allowed: (out, in), `in` a multiple of ", LANES, ".");
  require(!bias || (bias->shape(0) == out && kind_of(*bias, "Bias") == kind), "Bias ", bias ? shape(*bias) : "",
          " must have a number for each row of the weights ", shape(weights), ", of their type.");
  return {bytes_of(weights), bias ? bytes_of(*bias) : nullptr, kind, int(in), int(out)};
}

namespace {

void run(Vectors x, Weights weights, std::optional<Bias> bias, Written y, const std::string& isa, int threads) {
  const Linear layer = layer_of(weights, bias);
  const size_t vectors = x.size() / size_t(layer.in);
  require(kind_of(x, "Inputs") == layer.kind && x.size() == vectors * size_t(layer.in), "Inputs ", shape(x),
          ". Needed: rows as those of the weights ", shape(weights), ", of their type.");
  require(kind_of(y, "Outputs") == layer.kind && y.size() == vectors * size_t(layer.out), "Outputs ", shape(y),
          ". Needed: ", vectors, " rows of ", layer.out, " numbers, of the weights' type.");
  const Processor on{choose(isa), encode_kernels(isa), threads};
  auto* out = static_cast<uint8_t*>(y.data());
  nb::gil_scoped_release release;
  linear(layer, bytes_of(x), int(vectors), out, on);
}

}  // namespace

void bind_linear(nb::module_& m) {
  m.def("linear", &run, "x"_a.noconvert(), "weights"_a.noconvert(), "bias"_a.noconvert().none(), "y"_a.noconvert(),
        "isa"_a, "threads"_a);
}

}  // namespace tersekv
