// Checks of what callers give. A message says what was given, what is allowed, and what to do.
#pragma once
#include <sstream>
#include <stdexcept>

namespace tersekv {

template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace tersekv
