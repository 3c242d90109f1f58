// How fast this machine reads memory: what the bytes a second of a kernel are compared with.
#pragma once
#include <cstdint>

namespace tersekv {

// Reads `size` bytes once in `streams` places at a time, on up to `threads` threads. Returns their parity, so that no
// read can be left out.
uint64_t read_all(const uint8_t* data, int64_t size, int streams, int threads);

}  // namespace tersekv
