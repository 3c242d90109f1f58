// Attention from Python. See attend_bindings.cpp.
#pragma once
#include <nanobind/nanobind.h>

namespace tersekv {

void bind_attention(nanobind::module_& m);

}  // namespace tersekv
