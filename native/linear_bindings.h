// Linear layers from Python. See linear_bindings.cpp.
#pragma once
#include <nanobind/nanobind.h>

namespace tersekv {

void bind_linear(nanobind::module_& m);

}  // namespace tersekv
