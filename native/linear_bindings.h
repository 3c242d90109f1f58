// Linear layers from Python, and what other bindings need of them. See linear_bindings.cpp.
#pragma once
#include <nanobind/ndarray.h>

#include <optional>

#include "linear.h"

namespace tersekv {

using Weights = nanobind::ndarray<nanobind::ro, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;
using Bias = nanobind::ndarray<nanobind::ro, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;
using Vectors = nanobind::ndarray<nanobind::ro, nanobind::c_contig, nanobind::device::cpu>;
using Written = nanobind::ndarray<nanobind::c_contig, nanobind::device::cpu>;

template <class Array>
const uint8_t* bytes_of(const Array& x) {
  return static_cast<const uint8_t*>(x.data());
}

// Raises ValueError for shapes and types that are not a layer's.
Linear layer_of(const Weights& weights, const std::optional<Bias>& bias);

void bind_linear(nanobind::module_& m);

}  // namespace tersekv
