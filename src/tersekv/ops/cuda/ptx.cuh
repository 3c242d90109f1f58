// The instructions that CUDA C++ has no word for. NVRTC compiles this without any header.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define INLINE __device__ __forceinline__

constexpr int BLOCK = 64;            // tokens of a page
constexpr float MAGIC = 12582912.f;  // 1.5 * 2^23: the low bits of MAGIC + i are the integer i, |i| < 2^22
constexpr int MAGIC_BITS = 0x4B400000;
#define INFINITE __int_as_float(0x7F800000)

INLINE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
INLINE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
INLINE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
INLINE float half_to_float(u16 h) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(h));
  return y;
}
INLINE float bfloat_to_float(u16 h) { return __uint_as_float(u32(h) << 16); }

// The larger of two pairs of bf16 that are not negative.
INLINE u32 max_bfloats(u32 a, u32 b) {
  u32 y;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

// Every thread holds two cells of row lane / 4 of an 8 x 8 matrix of 16-bit cells; afterwards, of its transpose.
INLINE u32 transpose(u32 cells) {
  u32 y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(cells));
  return y;
}

// Bytes of a and b by the four low nibbles of `index`; one whose highest bit is set gives 0xFF or 0, by a byte's sign.
// `__byte_perm` is not it: it ignores those bits, and clears them with one more instruction.
INLINE u32 prmt(u32 a, u32 b, u32 index) {
  u32 y;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(index));
  return y;
}

// d = A B + c, 16 x 32 times 32 x 8 bytes. A is signed or not, B likewise.
template <bool A_SIGNED, bool B_SIGNED>
INLINE void mma(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const int (&c)[4]) {
#define MMA(TYPES)                                                                                       \
  asm("mma.sync.aligned.m16n8k32.row.col.s32." TYPES ".s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "      \
      "{%10,%11,%12,%13};"                                                                               \
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])                                                   \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]))
  if constexpr (A_SIGNED && B_SIGNED) MMA("s8.s8");
  else if constexpr (A_SIGNED) MMA("s8.u8");
  else if constexpr (B_SIGNED) MMA("u8.s8");
  else MMA("u8.u8");
#undef MMA
}

// Brings the line of an address to the second-level cache.
INLINE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

INLINE u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

template <class T>
INLINE T across(T x, int lanes) {
  return __shfl_xor_sync(~0u, x, lanes);
}

// Over the eight lanes that hold the same columns of an operand C.
INLINE float row_sum(float x) {
  x += across(x, 4);
  x += across(x, 8);
  return x + across(x, 16);
}
INLINE float row_max(float x) {
  x = fmaxf(x, across(x, 4));
  x = fmaxf(x, across(x, 8));
  return fmaxf(x, across(x, 16));
}
