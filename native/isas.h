// Which instruction sets this build holds, and which of them this processor has.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace tersekv {

struct Choice {
  const Kernels* kernels;
  bool runs;        // on this processor
  const char* why;  // what it needs
};

// Best first; the portable one is last and runs everywhere.
const std::vector<Choice>& choices();

// A Zen 5 drops hints for the second-level cache while an address is not translated, as for every new page. Its first
// level does not hold five pages beside what a tile needs, so it is asked for sides half a tile before they are read.
// A Zen 4 and a Granite Rapids do not drop them, and can have more lines on their way to the second level.
Hints hints();

// By name, or the best for an empty one. Throws std::invalid_argument that says what is allowed.
const Kernels& choose(const std::string& name);

}  // namespace tersekv
