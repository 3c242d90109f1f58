// Slots of shared memory that some warps fill and others read. Barriers count the warps that arrive.
#pragma once
#include "ptx.cuh"

INLINE void barrier_init(u64* barrier, int warps) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(warps) : "memory");
}
// By a whole warp, after all it has read or written.
INLINE void barrier_arrive(u64* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0)
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(shared_address(barrier))
                 : "memory");
}
// Until a phase is complete.
INLINE void barrier_wait(u64* barrier, u32 phase) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
#if __CUDA_ARCH__ >= 900
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
#else
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%0], %1;\n"
#endif
      "@!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(phase & 1)
      : "memory");
}
// What ordinary stores have written becomes visible to the matrix units, which read it on their own path.
INLINE void show_stores() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

template <int SLOTS>
struct Turn {  // of slots, one after the other
  int slot = 0;
  u32 phase = 0;
  INLINE void next() {
    if (++slot == SLOTS) slot = 0, phase++;
  }
};
