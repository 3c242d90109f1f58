// A side of a page from its declaration. Everything that kernels follow blindly is checked here.
#pragma once
#include <string>
#include <tuple>
#include <vector>

#include "pages.h"

namespace tersekv {

using PlaneArgs = std::tuple<std::string, std::string, int, int>;  // name, kind, offset, offset of the step or -1

// Throws std::invalid_argument that says what is allowed. `start`: of the side in its page; `bytes`: of the side.
// `half`: 0, or what the entries of a trellis are odd multiples of.
Side make_side(int bits, int d, int start, int bytes, int codes, const std::vector<PlaneArgs>& planes,
               const std::vector<float>& table, float half);

}  // namespace tersekv
