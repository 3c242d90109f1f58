// How the operating system maps memory that kernels read all over.
#pragma once
#include <cstdint>

namespace tersekv {

// Asks for large memory pages in the part of `size` bytes at `data` that fills such pages. Reading scattered pages of a
// pool then needs few address translations. A hint: where the system has none or declines, nothing changes.
void prefer_large_pages(const void* data, int64_t size);

}  // namespace tersekv
