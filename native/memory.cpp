#include "memory.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace tersekv {

void prefer_large_pages(const void* data, int64_t size) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t LARGE = uintptr_t(1) << 21;
  const uintptr_t start = (uintptr_t(data) + LARGE - 1) / LARGE * LARGE;
  const uintptr_t stop = (uintptr_t(data) + uintptr_t(size)) / LARGE * LARGE;
  if (start < stop) madvise(reinterpret_cast<void*>(start), stop - start, MADV_HUGEPAGE);
#else
  (void)data, (void)size;
#endif
}

}  // namespace tersekv
