// Decoder layers from Python. See decoder_bindings.cpp.
#pragma once
#include <nanobind/nanobind.h>

namespace tersekv {

void bind_decoder(nanobind::module_& m);

}  // namespace tersekv
