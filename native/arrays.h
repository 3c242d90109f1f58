// What arrays from Python are. Messages say what was given, what is allowed, and what to do.
#pragma once
#include <nanobind/ndarray.h>

#include <string>

#include "pages.h"
#include "require.h"

namespace tersekv {

template <class Array>
std::string shape(const Array& x) {
  std::string text = "(";
  for (size_t i = 0; i < x.ndim(); i++) text += (i ? ", " : "") + std::to_string(x.shape(i));
  return text + ")";
}

template <class Array>
Kind kind_of(const Array& x, const char* what) {
  const nanobind::dlpack::dtype type = x.dtype();
  const bool real = type.code == uint8_t(nanobind::dlpack::dtype_code::Float);
  if (real && type.bits == 32) return Kind::fp32;
  if (real && type.bits == 16) return Kind::fp16;
  require(type.code == uint8_t(nanobind::dlpack::dtype_code::Bfloat) && type.bits == 16, what,
          " of another type. Allowed: fp32, fp16 and bf16.");
  return Kind::bf16;
}

}  // namespace tersekv
