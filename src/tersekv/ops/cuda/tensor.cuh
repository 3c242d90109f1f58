// Products of bf16 matrices for 64 rows by four warps: operand A in registers, operand B in shared memory, rows of 128
// bytes with the 128-byte swizzle. On Hopper `wgmma`, elsewhere `mma.sync`; both leave the same element in the same register.
#pragma once
#include "ptx.cuh"

// The place of 16 bytes, `chunk` of 8, of a row: what eight rows hold at the same chunk lies in different banks.
INLINE int swizzled(int row, int chunk) { return row * 128 + ((chunk ^ row % 8) * 16); }

INLINE u32 bfloats(float low, float high) {
  u32 y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

INLINE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
INLINE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
INLINE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps the compiler from moving anything that touches accumulators past a wait or a begin.
template <int COUNT>
INLINE void hold(float (&d)[COUNT][4]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) asm volatile("" : "+f"(d[i][j])::"memory");
}

#define F4(i) "+f"(d[FIRST + i][0]), "+f"(d[FIRST + i][1]), "+f"(d[FIRST + i][2]), "+f"(d[FIRST + i][3])

// d[FIRST..] += or = A times eight bytes-rows groups of B; `rows`: address of B's first row at its 16 columns.
template <int ROWS, int FIRST, int COUNT>
INLINE void product(float (&d)[COUNT][4], const u32 (&a)[4], u32 rows, bool add) {
  const u64 b = u64(1) << 62 | u64(1024 >> 4) << 32 | u64(1) << 16 | (rows & 0x3FFFF) >> 4;
  if constexpr (ROWS == 64)
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, p, 1, 1, 0;\n}"
        : F4(0), F4(1), F4(2), F4(3), F4(4), F4(5), F4(6), F4(7)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));
  else
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, "
        "{%16,%17,%18,%19}, %20, p, 1, 1, 0;\n}"
        : F4(0), F4(1), F4(2), F4(3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));
}
#undef F4

#else

INLINE void products_begin() {}
INLINE void products_commit() {}
template <int PENDING>
INLINE void products_wait() {}
template <int COUNT>
INLINE void hold(float (&)[COUNT][4]) {}

template <int ROWS, int FIRST, int COUNT>
INLINE void product(float (&d)[COUNT][4], const u32 (&a)[4], u32 rows, bool add) {
  const int lane = threadIdx.x % 32, row = lane % 8 + lane / 16 * 8;
  const u32 start = rows & ~1023u, chunk = (rows & 127) / 16 + lane / 8 % 2;
#pragma unroll
  for (int n = 0; n < ROWS / 16; n++) {
    u32 b[4];
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(start + swizzled(16 * n + row, chunk))
                 : "memory");
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float(&c)[4] = d[FIRST + 2 * n + i];
#pragma unroll
      for (int j = 0; j < 4; j++) c[j] = add ? c[j] : 0;
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[2 * i]), "r"(b[2 * i + 1]));
    }
  }
}

#endif
