// Launches that overlap, on Hopper and newer (programmatic dependent launch); elsewhere, and for a launch that did not ask
// for it, nothing happens.
#pragma once

// From here on the next launch may begin; it must not use what this one writes before `wait_for_last_launch`.
__device__ __forceinline__ void let_next_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until everything that the launch before wrote can be read.
__device__ __forceinline__ void wait_for_last_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
