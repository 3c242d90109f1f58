// The encoding half of the Python module.
#pragma once
#include <nanobind/nanobind.h>

namespace tersekv {

void bind_encoding(nanobind::module_& m);

}  // namespace tersekv
