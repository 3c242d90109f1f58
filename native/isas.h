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

// Into which cache memory that is read later is asked for. A Zen 5 drops hints for the second level while an address is
// not translated, as for every new page. A Zen 4 and a Granite Rapids do not, and can have more lines on their way.
bool asks_for_first_level();

// By name, or the best for an empty one. Throws std::invalid_argument that says what is allowed.
const Kernels& choose(const std::string& name);

}  // namespace tersekv
