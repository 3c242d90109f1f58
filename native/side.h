// A side of a page from its declaration. Everything that kernels follow blindly is checked here.
#pragma once
#include <string>
#include <tuple>
#include <vector>

#include "pages.h"

namespace tersekv {

// Name, kind, offset, offset of the step or -1, and in how many groups: 1, or of tokens for a number of a channel and
// of channels for a number of a token.
using PlaneArgs = std::tuple<std::string, std::string, int, int, int>;

// Throws std::invalid_argument that says what is allowed. `start`: of the side in its page; `bytes`: of the side.
// `half`: 0, or what the entries of a trellis are odd multiples of. `channels_first`: the order of the scales.
Side make_side(int bits, int d, int start, int bytes, int codes, const std::vector<PlaneArgs>& planes,
               const std::vector<float>& table, float half, bool channels_first);

// A side of the `vq` recipe; `codes2`: of the second stage, if there is one.
Side make_books_side(int d, int start, int bytes, int codes, int codes2, const std::vector<PlaneArgs>& planes,
                     std::shared_ptr<const Books> books);

// A stage is (heads, places, entries, dim).
std::shared_ptr<const Books> make_books(int index, int heads, int places, int dim,
                                        std::vector<std::vector<float>> stages);

}  // namespace tersekv
