// A warp's own ring of slots in shared memory. Each slot holds a page, or one side (K or V) of it; copies run ahead of their use.
#pragma once
#include "ptx.cuh"

template <int SLOTS, int SLOT_BYTES>
struct Ring {
  u32 slots, barriers;  // shared-memory addresses

  static constexpr int BYTES = SLOTS * SLOT_BYTES;

  // `done`: the barriers, in memory that nothing else is ever written to.
  INLINE Ring(u8* memory, u64 (&done)[SLOTS]) : slots(shared_address(memory)), barriers(shared_address(done)) {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x % 32 == 0) {
      for (int i = 0; i < SLOTS; i++) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barriers + 8 * i));
      asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncwarp();
#endif
  }

  // Every lane calls it, also with nothing to copy, so that copies stay counted.
  template <int COPIED>
  INLINE void copy(int slot, const u8* from, bool any) const {
#if __CUDA_ARCH__ >= 900
    if (any && threadIdx.x % 32 == 0) {  // the copy engine: one instruction for the whole side
      const u32 barrier = barriers + 8 * slot;
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(COPIED) : "memory");
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       slots + slot * SLOT_BYTES),
                   "l"(from), "r"(COPIED), "r"(barrier)
                   : "memory");
    }
#else
    const int at = threadIdx.x % 32 * 16;
    if (any)
#pragma unroll
      for (int i = 0; i < COPIED; i += 512)
        if (i + at < COPIED)
          asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(slots + slot * SLOT_BYTES + i + at),
                       "l"(from + i + at)
                       : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }

  // Until the copy to `slot`, its `turn`-th, is complete.
  INLINE void wait(int slot, u32 turn) const {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(barriers + 8 * slot),
        "r"(turn & 1)
        : "memory");
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(SLOTS - 2) : "memory");
#endif
    __syncwarp();
  }
};
